"""How this process was launched: ranks, device, DeepSpeed. Imports torch, place, artifacts, console and errors.

The launchers differ in what they pass: `deepspeed` adds `--local_rank=N` and sets RANK, torchrun, MPI and Slurm set
variables only, plain python sets nothing.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from packaging.version import Version
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vlm_sft.artifacts import read_json
from vlm_sft.console import say, warn
from vlm_sft.errors import InterruptedRunError, RunError, VlmSftError
from vlm_sft.place import announce, read_place

ZERO_STAGES = {"zero2": 2, "zero3": 3}
OLDEST_DEEPSPEED = "0.19.2"
ALLOCATOR = "PYTORCH_ALLOC_CONF"  # in the environment; its older names are heard too
_ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Of a collective operation of the training itself: no rank may be away for so long there.
STEP_SECONDS = 1800.0
# Of the ranks' meetings outside of it, where one may have hours of work that the others have not: images to prepare,
# checksums of a large checkpoint, a report. A rank that has died ends them at once, by its closed connection.
MEETING_SECONDS = 7 * 86_400.0
WAITING_LINE_SECONDS = 30.0  # of waiting, after which the user is told whom for; then after twice as long, and so on
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher decided.

    Attributes:
        rank, local_rank, world_size: of this process.
        cpu: True when the machine has no GPU.
        deepspeed: DeepSpeed's configuration, or None.
        parallel: "single", "ddp", "zero2", "zero3" or "deepspeed" (a configuration of the user's own).
        local_size: processes of this run on this machine.
    """

    rank: int
    local_rank: int
    world_size: int
    cpu: bool
    deepspeed: dict[str, Any] | None
    parallel: str
    local_size: int = 1

    @property
    def gpu(self) -> int:
        """Number of this process's GPU among those that it sees: some launchers show each process its own alone."""
        return self.local_rank % max(1, torch.cuda.device_count())

    @property
    def device(self) -> str:
        """Where this process computes, in PyTorch's words."""
        return "cpu" if self.cpu else f"cuda:{self.gpu}"


def read_launch(local_rank: int | None, deepspeed: str | None) -> Launch:
    """Find out how this process was launched, and set what the libraries expect in the environment.

    Args:
        local_rank: what the deepspeed launcher passed as `--local_rank`; None under other launchers.
        deepspeed: "zero2", "zero3", a configuration file, or None (zero2 under the deepspeed launcher).

    Raises:
        RunError: DeepSpeed is asked for and is not installed or too old, or its configuration cannot be read.
    """
    place = rank, world_size, own_rank, local_size = read_place(local_rank)
    if world_size > 1 or "RANK" in os.environ:
        announce(place)
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _share_cores(local_size)
    if deepspeed is None and local_rank is not None:
        deepspeed = "zero2"
    if deepspeed is None:
        parallel = "ddp" if world_size > 1 else "single"
        return Launch(rank, own_rank, world_size, cpu, None, parallel, local_size)
    _require_deepspeed()
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if cpu:
        # transformers and accelerate would pass DeepSpeed by, silently, if this were set.
        os.environ.pop("ACCELERATE_USE_CPU", None)
    config = _deepspeed_config(deepspeed, cpu)
    parallel = deepspeed if deepspeed in ZERO_STAGES else "deepspeed"
    return Launch(rank, own_rank, world_size, cpu, config, parallel, local_size)


def expand_segments(launch: Launch) -> None:
    """Let the allocator of a GPU grow its segments: packs of many sizes would leave holes of memory between them.

    It has to be said before the GPU is first used, and what the user has said about the allocator stays.

    Args:
        launch: of this process; nothing is done on a CPU.
    """
    if not launch.cpu and not any(name in os.environ for name in _ALLOCATOR_NAMES):
        os.environ[ALLOCATOR] = "expandable_segments:True"


def _share_cores(processes: int) -> None:
    """Divide the cores between the processes of this machine, unless the user or the launcher has done so."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = _threads(processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def _threads(processes: int) -> int:
    """Threads of each of so many processes on this machine."""
    return max(1, (os.cpu_count() or 1) // processes)


@contextmanager
def threads_of_a_rank(launch: Launch) -> Iterator[None]:
    """Compute with as many threads as one rank of a launch would have on this machine, while the block runs."""
    before = torch.get_num_threads()
    if launch.cpu and launch.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_threads(launch.world_size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        raise RunError("DeepSpeed is asked for and not installed", "pip install 'vlm-sft[deepspeed]'")
    found = version("deepspeed")
    if Version(found) < Version(OLDEST_DEEPSPEED):
        raise RunError(
            f"DeepSpeed {found} is installed; before {OLDEST_DEEPSPEED} it may round the frequencies of rotary "
            "positions to bfloat16, which moves distant tokens",
            f"pip install 'deepspeed>={OLDEST_DEEPSPEED}'",
        )


def _deepspeed_config(name: str, cpu: bool) -> dict[str, Any]:
    """The configuration of one ZeRO stage, or the user's file; "auto" values are filled in by transformers."""
    if name not in ZERO_STAGES:
        if not Path(name).is_file():
            raise RunError(f"--deepspeed {name}: no such file", "pass zero2, zero3 or a DeepSpeed JSON file")
        config = read_json(name)
        if not isinstance(config, dict):
            raise RunError(f"--deepspeed {name}: not a JSON object", "pass a DeepSpeed JSON file")
        if config.pop("scheduler", None) is not None:
            warn(f"--deepspeed {name}: its scheduler is left out; the recipe says how the learning rate goes")
        return config
    stage = ZERO_STAGES[name]
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": not cpu, "contiguous_gradients": True}
    if stage == 3:
        zero |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto",
        }
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        # The trainer takes whole optimizer steps and logs them itself.
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if cpu:
        adamw = {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        config["optimizer"] = {"type": "AdamW", "params": adamw}
    return config


# Token budgets of one forward pass. On a GPU the activations of a 7B model with checkpointing take about 1 GiB at
# this size; on a CPU larger packs cost memory and gain nothing.
GPU_PACK_TOKENS = 8192
CPU_PACK_TOKENS = 2048


def pack_tokens(launch: Launch) -> int:
    """Token budget of one forward pass where the user gives none."""
    return CPU_PACK_TOKENS if launch.cpu else GPU_PACK_TOKENS


@contextmanager
def connected(launch: Launch) -> Iterator[None]:
    """Connect the ranks while the block runs.

    At an end that all ranks come to together they part in order. The threads of a process group that is still open
    when the interpreter goes may end a process with SIGABRT, although all its work is done.
    """
    ours = not torch.distributed.is_initialized()
    _connect(launch)
    try:
        yield
    except (VlmSftError, InterruptedRunError) as error:
        if ours and error.everywhere:
            _part()
        raise
    if ours:
        _part()


def _part() -> None:
    """Close the process group, also one that DeepSpeed opened for a single rank."""
    global _meeting
    _meeting = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _connect(launch: Launch) -> None:
    """Open the process groups: one for the training, one for meetings outside of it."""
    global _meeting
    if launch.deepspeed is not None and launch.cpu:
        _without_compiler()
    if launch.world_size == 1 or torch.distributed.is_initialized():
        return
    if not launch.cpu:
        torch.cuda.set_device(launch.gpu)
    backend = "gloo" if launch.cpu else "nccl"
    limit = timedelta(seconds=STEP_SECONDS)
    store, *_ = next(rendezvous("env://", timeout=limit))
    torch.distributed.init_process_group(
        backend, store=PrefixStore("training", store), rank=launch.rank, world_size=launch.world_size, timeout=limit
    )
    if launch.deepspeed is not None:
        join_deepspeed(launch)
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=MEETING_SECONDS))
    _meeting = _Meeting(launch, group, PrefixStore("meeting", store))


def join_deepspeed(launch: Launch) -> None:
    """Let DeepSpeed use the process group that is open.

    Raises:
        RunError: it is not installed, or too old.
    """
    _require_deepspeed()
    import deepspeed

    if launch.cpu:
        _without_compiler()
    limit = timedelta(seconds=STEP_SECONDS)
    deepspeed.init_distributed(dist_backend="gloo" if launch.cpu else "nccl", verbose=False, timeout=limit)


def _without_compiler() -> None:
    """Keep DeepSpeed from compiling its own shared-memory collectives, for minutes and with a C++ compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # gloo serves


class _Meeting:
    """Where the ranks wait for each other outside of the training: on CPUs, and for as long as it takes.

    Like PyTorch's own process groups, of which it is one, there is one of it in a process.

    Args:
        launch: the ranks.
        group: a gloo group of all ranks.
        store: holds who has come.
    """

    def __init__(self, launch: Launch, group: Any, store: Any) -> None:
        self.group = group
        self._rank, self._store = launch.rank, store
        self._number = 0
        hosts: list[Any] = [None] * launch.world_size
        torch.distributed.all_gather_object(hosts, socket.gethostname(), group=group)
        self._names = [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]

    def await_all(self, what: str) -> None:
        """Wait for all ranks; rank 0 says whom it waits for, now and then.

        Args:
            what: what they do, for that line.
        """
        self._number += 1
        self._store.set(f"{self._number}/{self._rank}", "")
        barrier = torch.distributed.barrier(group=self.group, async_op=True)
        began, line, pause = time.monotonic(), WAITING_LINE_SECONDS, 1e-3
        while not barrier.is_completed():
            time.sleep(pause)  # in Python, so that a signal is noticed
            pause = min(1.5 * pause, 0.25)
            waited = time.monotonic() - began
            if self._rank == 0 and waited > line:
                away = [name for rank, name in enumerate(self._names) if not self._has_come(rank)]
                more = f" and {len(away) - 4} more" if len(away) > 4 else ""
                say(f"rank 0 has waited {waited:.0f} s for {', '.join(away[:4])}{more} to {what}")
                line *= 2
        barrier.wait()  # raises what went wrong

    def _has_come(self, rank: int) -> bool:
        return bool(self._store.check([f"{self._number}/{rank}"]))


_meeting: _Meeting | None = None


def idle_gpus(launch: Launch, words: Sequence[str]) -> str:
    """One line where this process sees more GPUs than the one it uses: which one that is, and how to use all; else "".

    Args:
        launch: how it was launched.
        words: its command line, `sys.argv`.
    """
    count = torch.cuda.device_count()
    if launch.cpu or launch.world_size > 1 or count < 2:
        return ""
    program = [words[0]] if words[0].endswith(".py") and Path(words[0]).name != "__main__.py" else ["-m", "vlm_sft"]
    line = shlex.join(["torchrun", f"--nproc_per_node={count}", *program, *words[1:]])
    name = torch.cuda.get_device_name(launch.gpu)
    return f"one process uses one GPU: number {launch.gpu} of {count} ({name}); to use all of them: {line}"


def quiet_libraries() -> None:
    """Turn off what libraries print beside our own lines: loading bars, and warnings that no user can act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _several() -> bool:
    """Whether there are other ranks."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _group() -> Any:
    """The group of meetings; PyTorch's default one where this package has not opened any."""
    return _meeting and _meeting.group


def barrier(what: str) -> None:
    """Wait for the other ranks; all ranks must call it.

    Args:
        what: what they are waited for to do, e.g. "prepare the data"; the user is told when it takes long.
    """
    if _meeting is not None:
        _meeting.await_all(what)
    elif _several():
        torch.distributed.barrier()


def gather(value: Any) -> list[Any]:
    """What every rank passes, by rank, on every rank; all ranks must call it."""
    if not _several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=_group())
    return values


def agree(work: Callable[[], Result]) -> Result:
    """Do something on rank 0 and give its result, or the user's mistake that it raised, to every rank.

    Raises:
        VlmSftError: as `work` raised it.
    """
    box: list[Any] = [None, None]
    several = _several()
    if not several or torch.distributed.get_rank() == 0:
        try:
            box[0] = work()
        except (VlmSftError, InterruptedRunError) as error:
            box[1] = error
    if several:
        torch.distributed.broadcast_object_list(box, src=0, group=_group())
    if box[1] is not None:
        raise box[1]
    return box[0]

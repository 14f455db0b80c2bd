"""How this process was launched: ranks, device, DeepSpeed.

The launchers differ in what they pass: `deepspeed` adds `--local_rank=N` and sets RANK, torchrun, MPI and Slurm set
variables only, plain python sets nothing.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vlm_sft.common.errors import InterruptedRunError, RunError, VlmSftError
from vlm_sft.distributed.collectives import close_meetings, open_meetings
from vlm_sft.distributed.placement import announce, read_place
from vlm_sft.distributed.zero import (
    STEP_SECONDS,
    ZERO_STAGES,
    deepspeed_config,
    join_deepspeed,
    require_deepspeed,
    without_compiler,
)

ALLOCATOR = "PYTORCH_ALLOC_CONF"  # in the environment; its older names are heard too
_ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher decided.

    Attributes:
        rank, local_rank, world_size: of this process.
        cpu: True when the machine has no GPU.
        deepspeed: DeepSpeed's configuration, or None.
        parallel: "single", "ddp", "fsdp", "zero2", "zero3" or "deepspeed" (a configuration of the user's own).
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
    def fsdp(self) -> bool:
        """Whether FSDP divides weights, gradients and optimizer."""
        return self.parallel == "fsdp"

    @property
    def gpu(self) -> int:
        """Number of this process's GPU among those that it sees: some launchers show each process its own alone."""
        return self.local_rank % max(1, torch.cuda.device_count())

    @property
    def device(self) -> str:
        """Where this process computes, in PyTorch's words."""
        return "cpu" if self.cpu else f"cuda:{self.gpu}"


def read_launch(local_rank: int | None, deepspeed: str | None, fsdp: bool = False) -> Launch:
    """Find out how this process was launched, and set what the libraries expect in the environment.

    Args:
        local_rank: what the deepspeed launcher passed as `--local_rank`; None under other launchers.
        deepspeed: "zero2", "zero3", a configuration file, or None (zero2 under the deepspeed launcher).
        fsdp: divide weights, gradients and optimizer by FSDP; `accelerate launch --use_fsdp` asks for it, too.

    Raises:
        RunError: DeepSpeed is asked for and is not installed or too old, or its configuration cannot be read; FSDP is
            asked for beside it, or on one rank; or `accelerate launch` was given what would not be done.
    """
    fsdp = _heed_accelerate(deepspeed) or fsdp
    place = rank, world_size, own_rank, local_size = read_place(local_rank)
    if world_size > 1 or "RANK" in os.environ:
        announce(place)
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _share_cores(local_size)
    if fsdp:
        require_fsdp_alone(deepspeed, world_size)
    elif deepspeed is None and local_rank is not None:
        deepspeed = "zero2"
    if deepspeed is None:
        parallel = "fsdp" if fsdp else "ddp" if world_size > 1 else "single"
        return Launch(rank, own_rank, world_size, cpu, None, parallel, local_size)
    require_deepspeed()
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        port = str(_free_port())
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if cpu:
        # transformers and accelerate would pass DeepSpeed by, silently, if this were set.
        os.environ.pop("ACCELERATE_USE_CPU", None)
    config = deepspeed_config(deepspeed, cpu)
    parallel = deepspeed if deepspeed in ZERO_STAGES else "deepspeed"
    return Launch(rank, own_rank, world_size, cpu, config, parallel, local_size)


def _heed_accelerate(deepspeed: str | None) -> bool:
    """Whether `accelerate launch` asks for FSDP, in the environment; what would be passed over is refused.

    Raises:
        RunError: it asks for FSDP's first version, for weights in the host's memory, or for DeepSpeed.
    """
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "") == "true"  # transformers would load weights in a way of its own
    if fsdp and os.environ.get("FSDP_VERSION", "2") != "2":
        raise RunError("accelerate launch --use_fsdp: FSDP's first version is not offered", "add --fsdp_version 2")
    if fsdp and os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise RunError(
            "accelerate launch --fsdp_offload_params true: weights are not kept in the host's memory",
            "leave it out, or pass a DeepSpeed file with offload_optimizer to --deepspeed, without --use_fsdp",
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and deepspeed is None:
        raise RunError(
            "accelerate launch --use_deepspeed: the configuration of accelerate is not looked at",
            "use accelerate launch --multi_gpu, and --deepspeed zero2, zero3 or FILE after the program",
        )
    return fsdp


def require_fsdp_alone(deepspeed: str | None, ranks: int) -> None:
    """Refuse FSDP where something else divides the weights, or where there is nobody to divide them with.

    Raises:
        RunError: it is so.
    """
    if deepspeed is not None:
        raise RunError(f"--fsdp beside --deepspeed {deepspeed}: one of them divides the weights", "leave one out")
    if ranks < 2:
        raise RunError(
            "--fsdp: there is one rank, and nobody to divide the weights with",
            "start several: torchrun --nproc_per_node=N -m vlm_sft train …",
        )


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


# Token budgets of one forward pass. On a GPU the activations of a 7B model with checkpointing take about 1 GiB at
# this size; on a CPU larger packs cost memory and gain nothing, but where they answer questions: a step of generation
# takes nearly as long for few questions as for many, and no activations are kept.
GPU_PACK_TOKENS = 8192
CPU_PACK_TOKENS = 2048
CPU_ANSWER_TOKENS = 8192


def pack_tokens(launch: Launch) -> int:
    """Token budget of one forward pass where the user gives none."""
    return CPU_PACK_TOKENS if launch.cpu else GPU_PACK_TOKENS


def answer_tokens(launch: Launch, blockwise: bool) -> int:
    """Token budget of a forward pass that answers questions, where the user gives none.

    Args:
        launch: where it runs.
        blockwise: attention is computed image by image; otherwise it grows with the square of a pack.
    """
    return CPU_ANSWER_TOKENS if launch.cpu and blockwise else pack_tokens(launch)


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
    close_meetings()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _connect(launch: Launch) -> None:
    """Open the process groups: one for the training, one for meetings outside of it."""
    if launch.deepspeed is not None and launch.cpu:
        without_compiler()
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
        join_deepspeed(launch.cpu)
    open_meetings(PrefixStore("meeting", store))


def idle_gpus(launch: Launch, words: Sequence[str]) -> str:
    """One line where this process sees more GPUs than the one it uses: which one that is, and how to use all; else "".

    Args:
        launch: how it was launched.
        words: its command line, `sys.argv`.
    """
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(launch.gpu) if count > 1 and not launch.cpu else ""
    if not name or launch.world_size > 1:
        return ""
    used = f"one process uses one GPU: number {launch.gpu} of {count} ({name})"
    if "ipykernel" in words[0]:
        return f"{used}; a notebook is one process: start a script with torchrun to use all of them"
    program = [words[0]] if words[0].endswith(".py") and Path(words[0]).name != "__main__.py" else ["-m", "vlm_sft"]
    line = shlex.join(["torchrun", f"--nproc_per_node={count}", *program, *words[1:]])
    return f"{used}; to use all of them: {line}"


def launch_words(world_size: int, parallel: str, devices: str = "") -> list[str]:
    """The program that starts a training in processes of its own: this interpreter, or its launcher.

    Args:
        world_size: number of processes.
        parallel: "single", "ddp", or what DeepSpeed starts.
        devices: numbers of the GPUs to use, with commas, where other trainings run beside this one; "" for the first.
    """
    if world_size == 1:
        return [sys.executable, "-m", "vlm_sft", "train"]
    if parallel == "ddp":
        many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
        return [*many, "-m", "vlm_sft", "train"]
    program = Path(sys.executable).with_name("deepspeed")
    # DeepSpeed's launcher overrides CUDA_VISIBLE_DEVICES, and its port is the same for all trainings.
    where = [f"--include=localhost:{devices}", f"--master_port={_free_port()}"] if devices else []
    return [str(program), *(where or [f"--num_gpus={world_size}"]), "--module", "vlm_sft", "train"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def quiet_libraries() -> None:
    """Turn off what libraries print beside our own lines: loading bars, and warnings that no user can act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

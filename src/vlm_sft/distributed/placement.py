"""Where a launcher has put this process among all ranks and on its machine."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from vlm_sft.common.errors import RunError

# What a launcher calls a process's number, the number of processes, and both on its machine alone.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    # Not SLURM_NTASKS: that is of the job, and plain python in a job's script is one process of its own.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
_FIX = "start the ranks with torchrun, deepspeed, mpirun or srun"


class Place(NamedTuple):
    """Number of this process, number of all processes, and the same two among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def read_place(local_rank: int | None = None) -> Place:
    """Where the launcher has put this process, whichever it was.

    Args:
        local_rank: what the deepspeed launcher passed as `--local_rank`; None under other launchers.

    Raises:
        RunError: the launcher's variables contradict each other.
    """
    found = [tuple(map(_number, names)) for names in _NAMES]
    rank, size = next((numbers[:2] for numbers in found if None not in numbers[:2]), (0, 1))
    if size == 1:
        if "RANK" not in os.environ and (_number("WORLD_SIZE") or 1) > 1:
            raise RunError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} and no RANK", _FIX)
        return Place(0, 1, 0, 1)
    # By hand, RANK and WORLD_SIZE may be set without the local ones: those are the launcher's that started as many.
    same = [numbers for numbers in found if numbers[1] == size]
    local = next((numbers[2] for numbers in same if numbers[2] is not None), local_rank or 0)
    here = next((numbers[3] for numbers in same if numbers[3] is not None), size)
    assert rank is not None and size is not None and local is not None and here is not None
    if not (0 <= rank < size and 0 <= local < here <= size):
        what = f"the launcher contradicts itself: rank {rank} of {size}, on its machine {local} of {here}"
        raise RunError(what, f"{_FIX}, and unset RANK, WORLD_SIZE and LOCAL_RANK before")
    return Place(rank, size, local, here)


def _number(name: str) -> int | None:
    """A whole number of the environment; of Slurm's "4(x2),3" that of this machine; None where it is not set.

    Raises:
        RunError: it is no number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    each = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    node = os.environ.get("SLURM_NODEID", "")
    if not all(parts) or not node.isdecimal() or int(node) >= len(each):
        raise RunError(f"{name}={text} is not a whole number", _FIX)
    return each[int(node)]


def announce(place: Place) -> None:
    """Tell the libraries where this process stands, in torchrun's words, and where rank 0 is found.

    Raises:
        RunError: there are several machines, and the launcher does not say which one rank 0 is on.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(number) for name, number in zip(names, place, strict=True)})
    if place.world_size == 1:
        return
    if "MASTER_ADDR" not in os.environ and place.local_size < place.world_size:
        raise RunError(
            f"{place.world_size} ranks on several machines, and MASTER_ADDR does not say where rank 0 is",
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun; '
            "to mpirun pass the name of its first machine: -x MASTER_ADDR=NAME",
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    job = re.sub(r"\D", "", os.environ.get("SLURM_JOB_ID", ""))  # two jobs of a machine do not meet
    os.environ.setdefault("MASTER_PORT", str(29500 + int(job or 0) % 1000))

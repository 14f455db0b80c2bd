"""Where a process stands, in the words of every launcher."""

from __future__ import annotations

import os

import pytest

from vlm_sft.common.errors import RunError
from vlm_sft.distributed.placement import announce, read_place

_MINE = ("RANK", "WORLD_SIZE", "LOCAL_", "OMPI_", "MV2_", "PMI_", "MPI_", "SLURM_", "MASTER_")
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "11",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_ID": "4321",
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in {*named, *(name for name in os.environ if name.startswith(_MINE))}:
        monkeypatch.setenv(name, "")  # so that what `announce` sets is undone, too
        monkeypatch.delenv(name)


CASES = {
    "plain python": ({}, None, (0, 1, 0, 1)),
    "torchrun": ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, None, (9, 16, 1, 8)),
    "deepspeed": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, 1, (3, 4, 1, 2)),
    "deepspeed, flag only": ({"RANK": "1", "WORLD_SIZE": "2"}, 1, (1, 2, 1, 2)),
    "Open MPI": (OPEN_MPI, None, (3, 4, 1, 2)),
    "Intel MPI": (
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        None,
        (1, 2, 1, 2),
    ),
    "srun, uneven machines": (SLURM | {"SLURM_PROCID": "10"}, None, (10, 11, 2, 3)),
    "a job's script is no rank": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None, (0, 1, 0, 1)),
    "torchrun below srun": (
        {
            "RANK": "9",
            "WORLD_SIZE": "16",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "8",
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
        },
        None,
        (9, 16, 1, 8),
    ),
    "by hand below srun": (
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2",
        },
        None,
        (1, 2, 1, 2),
    ),
    "one process on purpose": (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, None, (0, 1, 0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_launcher_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, flag, expected = CASES[name]
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert tuple(read_place(flag)) == expected


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "on its machine 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one is not a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK"),
        (SLURM, "rank 11 of 11"),
    ],
)
def test_contradictions_are_told(variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RunError, match=told):
        read_place()


def test_libraries_find_each_other_in_the_words_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (OPEN_MPI | SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}).items():
        monkeypatch.setenv(key, value)
    place = read_place()
    with pytest.raises(RunError, match="MASTER_ADDR does not say where rank 0 is"):
        announce(place)
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    announce(place)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "2", "node-1", "29821"]

"""What all ranks do together: add up and compare on their devices; wait, gather and agree on CPUs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from vlm_sft.common.console import say
from vlm_sft.common.errors import InterruptedRunError, VlmSftError

# Of a meeting, where one may have hours of work that the others have not: images to prepare,
# checksums of a large checkpoint, a report. A rank that has died ends them at once, by its closed connection.
MEETING_SECONDS = 7 * 86_400.0
WAITING_LINE_SECONDS = 30.0  # of waiting, after which the user is told whom for; then after twice as long, and so on
Result = TypeVar("Result")


class _Meeting:
    """Where the ranks wait for each other outside of the training: on CPUs, and for as long as it takes.

    Like PyTorch's own process groups, of which it is one, there is one of it in a process.

    Args:
        group: a gloo group of all ranks.
        store: holds who has come.
    """

    def __init__(self, group: Any, store: Any) -> None:
        self.group = group
        self._rank, self._store = torch.distributed.get_rank(), store
        self._number = 0
        hosts: list[Any] = [None] * torch.distributed.get_world_size()
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


def open_meetings(store: Any) -> None:
    """Open the ranks' meetings; all ranks must call it.

    Args:
        store: a torch.distributed store that all ranks reach.
    """
    global _meeting
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=MEETING_SECONDS))
    _meeting = _Meeting(group, store)


def close_meetings() -> None:
    """Forget the group of the meetings, which goes with the process group."""
    global _meeting
    _meeting = None


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


def broadcast(tensor: torch.Tensor) -> None:
    """Overwrite a tensor with that of rank 0, in place; all ranks must call it, with the training's devices."""
    if _several():
        torch.distributed.broadcast(tensor, src=0)


def sum_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over the ranks, in place, and return it; all ranks must call it, with the training's devices."""
    if _several():
        torch.distributed.all_reduce(tensor)
    return tensor


def largest_count(count: int, device: torch.device) -> int:
    """The largest of a count over the ranks; all ranks must call it.

    Args:
        count: of this rank.
        device: where the ranks compute.
    """
    if not _several():
        return count
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


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

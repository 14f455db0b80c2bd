"""Work in threads, results in order: reading, hashing, decoding and processing release the interpreter lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import TypeVar

from vlm_sft.common.console import progress

Item = TypeVar("Item")
Result = TypeVar("Result")
BAR_FROM = 2000  # fewer items than this are done before a bar could be read


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, lookahead: int
) -> Iterator[Result]:
    """Yield the results in the order of the items; at most `lookahead` of them wait for the consumer.

    Args:
        work: called once an item; its exceptions reach the consumer.
        items: the items.
        threads: how many.
        lookahead: results that are prepared ahead.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > lookahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def map_images(work: Callable[[Item], Result], items: Iterable[Item], total: int, description: str) -> list[Result]:
    """Map over images in as many threads as there are processors, 16 at most, with a progress bar where there are many.

    Args:
        work: called once an item; its exceptions propagate.
        items: the items.
        total: how many there are.
        description: what the bar says.
    """
    threads = min(16, cpu_count() or 1)
    results = ordered_map(work, items, threads, 4 * threads)
    if total < BAR_FROM:
        return list(results)
    listed: list[Result] = []
    with progress(total, description, "images") as bar:
        for result in results:
            listed.append(result)
            bar.advance()
    return listed

"""The rates of a device that is not in the table, measured: matrix products, copies and small operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from vlm_sft.common.record import device_name, memory_bytes
from vlm_sft.forecast.hardware import Rates, find_device, table_rates
from vlm_sft.forecast.shapes import ModelShape
from vlm_sft.model.cpu.matmul import multiply, narrows, stream_dtype

PIECE_SECONDS = 0.03  # of each piece of work in a round of measurements
ROUNDS = (2, 6)  # at least, and at most on a busy machine
PAUSE_SECONDS = 0.1  # between rounds on a busy machine: another program may end meanwhile
AGREE = 1.15  # two rounds agree that differ by less
BUSY_SHARE = 0.85  # of the elapsed time: a process that computes for less competes with others, or with a CPU quota
TOKENS = 1024  # rows of the products that are measured
WIDEST = 2048  # channels of their sides: wider ones have the same rate and take longer
FRESH_MEMORY = 4.0  # on a CPU: how much slower an operation is that writes to newly allocated memory
MEASURED_SPREAD = 1.35
MOST_UNREST = 8.0
FRESH_SECONDS = 60.0  # for so long a measurement holds: forecasts that are compared use the same one
_known: dict[tuple[ModelShape, torch.dtype], tuple[float, Rates]] = {}


def rates_here(model: ModelShape, dtype: torch.dtype) -> Rates:
    """The rates of this machine's device: from the table, or measured at the sizes of a model, at most once a minute.

    Args:
        model: its layer gives the sizes of the products.
        dtype: of the computation. On a CPU bfloat16 is measured beside float32, in turn, so that both meet the same
            disturbances: adapters and attention are computed in float32 there.
    """
    if torch.cuda.is_available():
        known = find_device(torch.cuda.get_device_name())
        if known is not None:
            return table_rates(known)
    measured, rates = _known.get((model, dtype), (-FRESH_SECONDS, None))
    if rates is not None and time.monotonic() - measured <= FRESH_SECONDS:
        return rates
    formats = (torch.float32, dtype) if dtype == torch.bfloat16 and narrows("cpu") else (dtype,)
    for one, found in zip(formats, measured_rates(model, *formats), strict=True):
        exact = _known[model, torch.float32][1].flops if one != formats[0] else None
        rates = replace(found, float32_flops=exact)
        _known[model, one] = time.monotonic(), rates
    assert rates is not None
    return rates


@torch.no_grad()
def measured_rates(model: ModelShape, *dtypes: torch.dtype) -> list[Rates]:
    """Measure matrix products at the sizes of a layer, a large simple operation, and a small one.

    One round is not enough: threads that were just started may share a core until the system moves one of them, and
    another program may hold the cores. Rounds are repeated until two agree on a free machine, up to a limit.

    Args:
        model: its layer gives the sizes.
        *dtypes: number formats of the products; between these all compute in the first one's.

    Returns:
        The rates in each of the formats.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    hidden, inner = min(model.text.hidden, WIDEST), min(model.text.intermediate, WIDEST)
    weights = [torch.randn(inner, hidden, dtype=dtype, device=device) for dtype in dtypes]
    rest = stream_dtype(weights[0])
    rows = torch.randn(TOKENS, hidden, dtype=rest, device=device)
    large = torch.randn(TOKENS, max(inner, 1024), dtype=rest, device=device)
    small = torch.randn(16, dtype=rest, device=device)
    result = torch.empty_like(large)
    works: tuple[Callable[[], object], ...] = (
        lambda: small + small,  # before threads are started for the others, which then wait for work and take time
        *(partial(multiply, rows, weight, few_shapes=False) for weight in weights),
        lambda: torch.mul(large, 1.5, out=result),
    )
    rounds: list[tuple[TimedCalls, ...]] = []
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and not settled([one[1] for one in rounds])):
        if len(rounds) >= ROUNDS[0]:
            time.sleep(PAUSE_SECONDS)
        rounds.append(tuple(_timed(work, PIECE_SECONDS, device) for work in works))
    launch, *products, copy = (call_seconds(timed) for timed in zip(*rounds, strict=True))
    moved = 2 * large.numel() * large.element_size() / (1.0 if gpu else FRESH_MEMORY)
    measured = partial(
        Rates,
        device_name(),
        bandwidth=moved / copy,
        launch=launch,
        memory=memory_bytes(),
        gpu=gpu,
        source=f"measured here {len(rounds)} times on products of {TOKENS} x {hidden} x {inner}",
        spread=MEASURED_SPREAD,
        unrest=unrest([one[1] for one in rounds]),
    )
    return [measured(flops=2 * TOKENS * hidden * inner / product) for product in products]


@dataclass(frozen=True, slots=True)
class TimedCalls:
    """Repeated calls of one piece of work.

    Attributes:
        seconds: of each call.
        share: of the elapsed time in which this thread was computing; 1 on a free machine.
    """

    seconds: tuple[float, ...]
    share: float

    @property
    def busy(self) -> bool:
        """Whether other programs took the processor."""
        return self.share < BUSY_SHARE

    @property
    def median(self) -> float:
        """Not the mean: while another program starts, a few calls wait for a core as long as all others take."""
        return statistics.median(self.seconds)

    @property
    def undisturbed(self) -> float:
        """Seconds of an undisturbed call: the first decile, or the mean computing time if that is less.

        Where others hold the cores most of the time every call is interrupted, but its computing time is no longer.
        """
        fastest = sorted(self.seconds)[len(self.seconds) // 10]
        return min(fastest, self.share * statistics.mean(self.seconds))


def settled(rounds: Sequence[TimedCalls]) -> bool:
    """Whether the newest round and an earlier one agree, on a machine that was free."""
    calm = [one.median for one in rounds if not one.busy]
    return not rounds[-1].busy and any(1 / AGREE < one / calm[-1] < AGREE for one in calm[:-1])


def call_seconds(rounds: Sequence[TimedCalls]) -> float:
    """Seconds of one call: of the quickest round on a free machine, else of undisturbed calls."""
    calm = [one.median for one in rounds if not one.busy]
    return min(calm) if calm else min(one.undisturbed for one in rounds)


def unrest(rounds: Sequence[TimedCalls]) -> float:
    """How many times longer calls took, on average, than `call_seconds`; 1 where the last round was undisturbed."""
    if not rounds[-1].busy:
        return 1.0
    calls = [seconds for one in rounds if one.busy for seconds in one.seconds]
    # The mean, not the median: a call that waits for a core takes many times as long, and a run waits for all of them.
    return min(MOST_UNREST, max(1.0 + 1e-3, statistics.mean(calls) / call_seconds(rounds)))


def _timed(work: Callable[[], object], budget: float, device: torch.device) -> TimedCalls:
    """Repeat calls within a budget of seconds."""
    work()
    seconds: list[float] = []
    began = now = time.perf_counter()
    computed = time.thread_time()
    while now - began < budget:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        before, now = now, time.perf_counter()
        seconds.append(now - before)
    # While a GPU computes this thread may sleep: its share of the time says nothing there.
    share = (time.thread_time() - computed) / (now - began) if device.type == "cpu" else 1.0
    return TimedCalls(tuple(seconds), share)

"""Whether a run fits, and which change would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vlm_sft.common.formats import size
from vlm_sft.forecast.calibration import PROBE, Calibration
from vlm_sft.forecast.estimate import CACHED_IMAGES, FEATURES, MAPPED, RunForecast, forecast_run
from vlm_sft.forecast.inputs import ForecastInputs
from vlm_sft.forecast.memory import CONTEXT_BYTES
from vlm_sft.forecast.setting import RankLayout

PACK_SHARES = (0.5, 0.25, 0.125)


@dataclass(frozen=True, slots=True)
class Shortage:
    """What a run lacks.

    Attributes:
        what: one sentence with both numbers.
        fix: the changes that would make it fit, as flags.
        sure: even the low end of the forecast does not fit.
    """

    what: str
    fix: str
    sure: bool


def shortages(
    inputs: ForecastInputs,
    forecast: RunForecast,
    calibration: Calibration,
    disk_free: float | None,
    cache_free: float | None = None,
) -> list[Shortage]:
    """Compare a forecast with what there is.

    Args:
        inputs: the run.
        forecast: its forecast.
        calibration: what corrected it.
        disk_free: bytes that are free where the run writes; None for unknown.
        cache_free: the same of the cache's disk, which a run can do without; None where it is the run's own.

    Returns:
        What does not fit by the expected numbers, of memory, disk and the cache's disk.
    """
    problems = []
    room, peak, mapped = _memory_room(inputs), forecast.peak_bytes, _mapped_bytes(forecast)
    if peak.value - mapped > room:
        device = inputs.setting.rates.name
        what = f"memory: {size(peak.value)} per process are forecast, {device} has {size(room)}"
        problems.append(Shortage(what, _memory_fix(inputs, calibration, room), peak.low - mapped > room))
    apart = cache_free is not None
    if disk_free is not None and (added := _added_bytes(inputs, forecast, apart)) > disk_free:
        what = f"disk: {size(added)} are forecast at the peak, {size(disk_free)} are free"
        sure = added / 1.05 > disk_free
        problems.append(Shortage(what, _disk_fix(inputs, calibration, disk_free, apart), sure))
    if cache_free is not None and (cached := _cached_bytes(forecast)) > cache_free:
        what = f"disk of the cache: {size(cached)} are forecast, {size(cache_free)} are free: not all will be kept"
        problems.append(Shortage(what, "free some space, or pass --cache_dir on a larger disk", False))
    return problems


def _mapped_bytes(forecast: RunForecast) -> float:
    """Bytes of files that are in memory as long as there is room, and need none."""
    return forecast.items["peak_bytes"].get(MAPPED, 0.0)


def _cached_bytes(forecast: RunForecast) -> float:
    """Bytes that a run adds to the cache."""
    return sum(forecast.items["disk_bytes"].get(name, 0.0) for name in (FEATURES, CACHED_IMAGES))


def _added_bytes(inputs: ForecastInputs, forecast: RunForecast, apart: bool) -> float:
    """Bytes that a run adds to its disk at the peak; `apart`: its cache is on another one."""
    cached = _cached_bytes(forecast) if apart else 0.0
    return forecast.peak_disk_bytes - inputs.output.written_bytes - cached


def _memory_room(inputs: ForecastInputs) -> float:
    """Bytes that the tensors of one process may take; processes on a CPU share the machine's memory."""
    rates = inputs.setting.rates
    return rates.memory - CONTEXT_BYTES if rates.gpu else rates.memory / inputs.setting.ranks.count


def _memory_changes(inputs: ForecastInputs) -> Iterator[tuple[str, ForecastInputs]]:
    """Changes that save memory, the cheapest in time first; each alone, then together."""
    tokens, single = inputs.passes.epoch.largest.tokens, max(1, inputs.passes.longest_tokens)
    for share in PACK_SHARES:
        if tokens * share >= single:
            yield f"--tokens_per_pack {round(tokens * share)}", _smaller_packs(inputs, share)
    settings = list(_saving_settings(inputs))
    for flag, change in settings:
        yield flag, inputs.with_setting(**change)
    share = max(PACK_SHARES[-1], min(1.0, single / max(1.0, tokens)))
    together = _smaller_packs(inputs, share)
    flags = [f"--tokens_per_pack {round(tokens * share)}"] if share < 1 else []
    for flag, change in settings:
        if "four_bit" in change and together.setting.ranks.shared_weights > 1:
            continue  # 4-bit weights cannot be divided
        together = together.with_setting(**change)
        flags.append(flag)
        yield " ".join(flags), together
    yield " ".join([*flags, "and a quarter of --max_pixels"]), _smaller_packs(together, 0.25)


def _saving_settings(inputs: ForecastInputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flags that save memory at the same size of a pack, with what they change in the setting."""
    setting, ranks = inputs.setting, inputs.setting.ranks
    if not setting.checkpointing:
        yield "--gradient_checkpointing true", {"checkpointing": True}
    if not setting.rates.gpu or ranks.shared_weights > 1:
        return
    if ranks.count > 1:
        yield "--deepspeed zero3", {"ranks": RankLayout(ranks.count, "zero3")}
    if not setting.four_bit and not setting.adapter.everything:
        yield "--load_in_4bit true", {"four_bit": True}


def _memory_fix(inputs: ForecastInputs, calibration: Calibration, room: float) -> str:
    """The first change after which the forecast fits."""
    plain = Calibration(calibration.basis, calibration.factors) if calibration.basis != PROBE else Calibration()
    for flags, changed in _memory_changes(inputs):
        fitting = forecast_run(changed, plain)
        if fitting.peak_bytes.value - _mapped_bytes(fitting) <= room:
            return f"it would fit with {flags}"
    return "use a device with more memory, more devices with --deepspeed zero3, or a smaller --base_model"


def _disk_fix(inputs: ForecastInputs, calibration: Calibration, free: float, apart: bool) -> str:
    """The first change after which the peak fits."""
    output = inputs.output
    changes: list[tuple[str, ForecastInputs]] = []
    if output.saving.steps and output.saving.kept > 1:
        one = replace(output, saving=replace(output.saving, limit=1))
        changes.append(("--save_total_limit 1", replace(inputs, output=one)))
    if inputs.images.keep_features and not apart:
        changes.append(("--feature_cache off", inputs.with_features(False, False)))
    if len(changes) > 1:
        changes.append(("--save_total_limit 1 --feature_cache off", changes[0][1].with_features(False, False)))
    for flags, changed in changes:
        if _added_bytes(changed, forecast_run(changed, calibration), apart) <= free:
            return f"it would fit with {flags}"
    return "free some space, or pass --output_dir and --cache_dir on a larger disk"


def _smaller_packs(inputs: ForecastInputs, share: float) -> ForecastInputs:
    """The same run with packs of a share of their tokens."""
    epoch = inputs.passes.epoch
    epoch = replace(epoch, largest=epoch.largest.times(share))
    return replace(inputs, passes=replace(inputs.passes, epoch=epoch))

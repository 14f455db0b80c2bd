"""Does a run fit, and which change would make it fit?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlm_sft.forecast.calibration import PROBE, Calibration
from vlm_sft.forecast.estimate import CACHED, Case, Forecast, forecast
from vlm_sft.forecast.memory import CONTEXT_BYTES, Ranks

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
    case: Case, found: Forecast, calibration: Calibration, disk_free: float | None, cache_free: float | None = None
) -> list[Shortage]:
    """Compare a forecast with what there is.

    Args:
        case: the run.
        found: its forecast.
        calibration: what corrected it.
        disk_free: bytes that are free where the run writes; None for unknown.
        cache_free: the same of the cache's disk, which a run can do without; None where it is the run's own.
    """
    problems = []
    room = _room(case)
    if found.peak_bytes.value > room:
        device = case.setting.rates.name
        what = f"memory: {size(found.peak_bytes.value)} a process are forecast, {device} has {size(room)}"
        problems.append(Shortage(what, _memory_fix(case, calibration, room), found.peak_bytes.low > room))
    apart = cache_free is not None
    if disk_free is not None and (coming := _coming(case, found, apart)) > disk_free:
        what = f"disk: {size(coming)} are forecast in the fullest moment, {size(disk_free)} are free"
        sure = coming / 1.05 > disk_free
        problems.append(Shortage(what, _disk_fix(case, calibration, disk_free, apart), sure))
    if cache_free is not None and (cached := _cached(found)) > cache_free:
        what = f"disk of the cache: {size(cached)} are forecast, {size(cache_free)} are free: not all will be kept"
        problems.append(Shortage(what, "free some space, or pass --cache_dir on a larger disk", False))
    return problems


def _cached(found: Forecast) -> float:
    """Bytes that a run adds to the cache."""
    return sum(found.items["disk_bytes"].get(name, 0.0) for name in CACHED)


def _coming(case: Case, found: Forecast, apart: bool) -> float:
    """Bytes that the fullest moment adds to the disk of a run; `apart`: its cache is on another one."""
    return found.fullest_bytes - case.written_bytes - (_cached(found) if apart else 0.0)


def size(count: float) -> str:
    """Bytes in gigabytes with three digits."""
    return f"{count / 1e9:.3g} GB"


def _room(case: Case) -> float:
    """Bytes that the tensors of one process may take; processes on a CPU share the machine's memory."""
    rates = case.setting.rates
    return rates.memory - CONTEXT_BYTES if rates.gpu else rates.memory / case.ranks.count


def _memory_changes(case: Case) -> Iterator[tuple[str, Case]]:
    """Changes that save memory, the cheapest in time first; each alone, then together."""
    setting = case.setting
    together, flags = case, []
    tokens = case.epoch.largest.tokens
    single = max(1, case.longest)
    for share in PACK_SHARES:
        if tokens * share >= single:
            yield f"--tokens_per_pack {round(tokens * share)}", _smaller_packs(case, share)
    options: list[tuple[str, Case]] = []
    if not setting.checkpointing:
        options.append(("--gradient_checkpointing true", replace(case, setting=replace(setting, checkpointing=True))))
    if setting.rates.gpu and case.ranks.count > 1 and case.ranks.shared_weights == 1:
        options.append(("--deepspeed zero3", replace(case, ranks=Ranks(case.ranks.count, "zero3"))))
    if setting.rates.gpu and not setting.four_bit and not setting.adapter.everything:
        options.append(("--load_in_4bit true", replace(case, setting=replace(setting, four_bit=True))))
    yield from options
    share = max(PACK_SHARES[-1], min(1.0, single / max(1.0, tokens)))
    together = _smaller_packs(case, share)
    if share < 1:
        flags.append(f"--tokens_per_pack {round(tokens * share)}")
    for flag, changed in options:
        if "zero3" in flag and any("4bit" in other for other in flags):
            continue
        if "4bit" in flag and any("zero3" in other for other in flags):
            continue
        together = replace(
            together,
            setting=replace(
                together.setting,
                checkpointing=changed.setting.checkpointing or together.setting.checkpointing,
                four_bit=changed.setting.four_bit or together.setting.four_bit,
            ),
            ranks=changed.ranks if "zero3" in flag else together.ranks,
        )
        flags.append(flag)
        yield " ".join(flags), together
    halved = together.epoch.largest.times(0.25)
    smaller = replace(together, epoch=replace(together.epoch, largest=halved))
    yield " ".join([*flags, "and a quarter of --max_pixels"]), smaller


def _memory_fix(case: Case, calibration: Calibration, room: float) -> str:
    """The first change after which the forecast fits."""
    plain = Calibration(calibration.basis, calibration.factors) if calibration.basis != PROBE else Calibration()
    for flags, changed in _memory_changes(case):
        if forecast(changed, plain).peak_bytes.value <= room:
            return f"it would fit with {flags}"
    return "use a device with more memory, more devices with --deepspeed zero3, or a smaller --base_model"


def _disk_fix(case: Case, calibration: Calibration, free: float, apart: bool) -> str:
    """The first change after which the fullest moment fits."""
    changes: list[tuple[str, Case]] = []
    if case.saving.steps and case.saving.kept > 1:
        changes.append(("--save_total_limit 1", replace(case, saving=replace(case.saving, limit=1))))
    if case.features and not apart:
        changes.append(("--feature_cache off", replace(case, features=False, final_features=False)))
    if len(changes) > 1:
        both = replace(changes[0][1], features=False, final_features=False)
        changes.append(("--save_total_limit 1 --feature_cache off", both))
    for flags, changed in changes:
        if _coming(case, forecast(changed, calibration), apart) <= free:
            return f"it would fit with {flags}"
    return "free some space, or pass --output_dir and --cache_dir on a larger disk"


def _smaller_packs(case: Case, share: float) -> Case:
    """The same run with packs of a share of their tokens."""
    return replace(case, epoch=replace(case.epoch, largest=case.epoch.largest.times(share)))

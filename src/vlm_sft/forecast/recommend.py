"""Which recipe to take for a budget: affordable, good, cheap.

A recipe is affordable when its forecast time, memory and disk fit. Of the affordable ones the cheapest that is not
significantly worse than the best is taken (priority balanced), or the best (quality), or the cheapest that trains on
all data (speed). A larger budget never leads to a recipe of lower quality: the choice for a smaller budget is given up
only for one that is at least as good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_sft.common.formats import duration, size
from vlm_sft.forecast.pareto import cheapest_not_worse, pareto_front
from vlm_sft.forecast.recipe_quality import Quality

PRIORITIES = ("quality", "balanced", "speed")
ONE_SIDED_95 = 1.645  # standard errors
TWO_SIDED_95 = 1.96
PLOT_WIDTH, PLOT_HEIGHT = 60, 12
NAMES_AWAY = 5  # rows from its point that a name may stand


@dataclass(frozen=True, slots=True)
class RecipeCandidate:
    """One recipe with its forecast.

    Attributes:
        name: of the recipe.
        epochs: passes over the data.
        seconds, high_seconds: forecast time, and the upper end of its interval.
        peak_bytes, disk_bytes: forecast memory of a device, and disk at its peak.
        quality: measured; None where it was not.
        partial: trains on a part of the data only, to try things out.
        problem: why it does not fit, whatever the hours; "" when it does.
    """

    name: str
    epochs: float
    seconds: float
    high_seconds: float
    peak_bytes: float
    disk_bytes: float
    quality: Quality | None
    partial: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to take, and why.

    Attributes:
        chosen, runner_up: names of recipes; None when nothing is affordable, or nothing else.
        reasons: lines for the user.
        front: names of the recipes that no other beats in time and quality.
        measured: whether quality was measured; otherwise epochs stand for it.
    """

    chosen: str | None
    runner_up: str | None
    reasons: tuple[str, ...]
    front: tuple[str, ...]
    measured: bool


def worth(candidate: RecipeCandidate, measured: bool) -> float:
    """The quality that candidates are ordered by: measured, or their epochs where none was measured."""
    if not measured:
        return 0.0 if candidate.partial else candidate.epochs
    return candidate.quality.value if candidate.quality is not None else -math.inf


def significantly_worse(one: RecipeCandidate, best: RecipeCandidate, measured: bool) -> bool:
    """Whether the difference in quality is more than chance, one-sided at 5 %, the two taken for independent."""
    if not measured:
        # Nothing is known but that more epochs cost more: a fifth of the epochs more or less are taken for equal.
        return worth(one, False) < 0.8 * worth(best, False)
    if one.quality is None or best.quality is None:
        return one.quality is None
    spread = math.hypot(one.quality.half_width, best.quality.half_width) / TWO_SIDED_95
    return best.quality.value - one.quality.value > ONE_SIDED_95 * spread


def recommend(
    candidates: Sequence[RecipeCandidate], hours: float, disk_bytes: float | None = None, priority: str = "balanced"
) -> Recommendation:
    """Choose a recipe.

    Args:
        candidates: the recipes.
        hours: what the training may take.
        disk_bytes: what it may write; None for no limit.
        priority: one of `PRIORITIES`.
    """
    measured = any(candidate.quality is not None and not candidate.partial for candidate in candidates)
    front = tuple(
        candidates[index].name
        for index in pareto_front([(candidate.seconds, worth(candidate, measured)) for candidate in candidates])
    )
    reasons = [_refusal(one, hours, disk_bytes) for one in candidates]
    fitting = [one for one, reason in zip(candidates, reasons, strict=True) if not reason]
    refused = [f"{one.name}: {reason}" for one, reason in zip(candidates, reasons, strict=True) if reason]
    serious = [one for one in fitting if not one.partial] or fitting
    if not serious:
        return Recommendation(None, None, tuple(refused), front, measured)
    chosen = _steady_choice(serious, priority, measured)
    others = [one for one in serious if one is not chosen]
    runner_up = _steady_choice(others, priority, measured) if others else None
    lines = [_reason(chosen, serious, priority, measured)]
    if chosen.high_seconds > hours * 3600:
        lines.append(f"{chosen.name} may take up to {chosen.high_seconds / 3600:.1f} h: more than the budget")
    return Recommendation(chosen.name, runner_up.name if runner_up else None, (*lines, *refused), front, measured)


def _refusal(one: RecipeCandidate, hours: float, disk_bytes: float | None) -> str:
    """Why a recipe cannot be afforded, or ""."""
    if one.problem:
        return one.problem
    if one.seconds > hours * 3600:
        return f"{one.seconds / 3600:.2f} h are forecast, more than {hours:g} h"
    if disk_bytes is not None and one.disk_bytes > disk_bytes:
        return f"{size(one.disk_bytes)} of disk are forecast, more than {size(disk_bytes)}"
    return ""


def _choice(candidates: Sequence[RecipeCandidate], priority: str, measured: bool) -> RecipeCandidate:
    """The choice among affordable recipes, without regard to smaller budgets."""
    by_cost = sorted(candidates, key=lambda one: (one.seconds, one.name))
    best = max(by_cost, key=lambda one: worth(one, measured))
    if priority == "speed":
        return by_cost[0]
    if priority == "quality":
        return best
    return cheapest_not_worse(by_cost, best, lambda one: significantly_worse(one, best, measured))


def _steady_choice(candidates: Sequence[RecipeCandidate], priority: str, measured: bool) -> RecipeCandidate:
    """The choice for this budget; one for a smaller budget stays until another is at least as good."""
    by_cost = sorted(candidates, key=lambda one: (one.seconds, one.name))
    kept = by_cost[0]
    for count in range(1, len(by_cost) + 1):
        found = _choice(by_cost[:count], priority, measured)
        if worth(found, measured) >= worth(kept, measured):
            kept = found
    return kept


def _reason(chosen: RecipeCandidate, affordable: Sequence[RecipeCandidate], priority: str, measured: bool) -> str:
    """Why this one."""
    if priority == "speed":
        return f"{chosen.name} is the cheapest recipe that trains on all data"
    if not measured:
        return f"quality is not measured for this set-up: {chosen.name} has the most epochs that are affordable" + (
            "" if priority == "quality" else ", those within a fifth of the most taken for equal"
        )
    best = max(affordable, key=lambda one: worth(one, True))
    assert chosen.quality is not None and best.quality is not None
    if chosen is best:
        return f"{chosen.name} is the best affordable recipe ({chosen.quality.text})"
    return (
        f"{chosen.name} ({chosen.quality.text}) is the cheapest one that is not significantly worse than the best "
        f"affordable one, {best.name} ({best.quality.text})"
    )


def plot(candidates: Sequence[RecipeCandidate], recommendation: Recommendation) -> list[str]:
    """Quality against time as text: `#` the choice, `*` on the Pareto front, `o` beaten; time on a logarithmic axis."""
    shown = [one for one in candidates if worth(one, recommendation.measured) > -math.inf and one.seconds > 0]
    if not shown:
        return []
    across = [math.log(one.seconds) for one in shown]
    up = [worth(one, recommendation.measured) for one in shown]
    rows = [[" "] * PLOT_WIDTH for _ in range(PLOT_HEIGHT)]
    places = [
        (PLOT_HEIGHT - 1 - _place(y, up, PLOT_HEIGHT - 1), _place(x, across, PLOT_WIDTH - 14))
        for x, y in zip(across, up, strict=True)
    ]
    for one, (row, column) in zip(shown, places, strict=True):
        sign = "#" if one.name == recommendation.chosen else "*" if one.name in recommendation.front else "o"
        rows[row][column] = min(sign, rows[row][column].strip() or "o")  # of points in one place the better sign
    unnamed = [one.name for one, place in zip(shown, places, strict=True) if not _named(rows, *place, one.name)]
    label = "measured quality" if recommendation.measured else "epochs (quality is not measured)"
    bottom = f"  {duration(min(one.seconds for one in shown))}"
    top = duration(max(one.seconds for one in shown))
    return [
        f"  {label}",
        *("  |" + "".join(row).rstrip() for row in rows),
        "  +" + "-" * PLOT_WIDTH,
        bottom + " " * max(1, PLOT_WIDTH - len(bottom) - len(top)) + top,
        *([f"  no room for the names of: {', '.join(unnamed)}"] if unnamed else []),
    ]


def _named(rows: list[list[str]], row: int, column: int, name: str) -> bool:
    """Write a name beside its point, or in a row nearby, where it touches nothing; False where there is no room."""
    beside = (column + 2, column - 1 - len(name))
    for line in sorted(range(len(rows)), key=lambda line: (abs(line - row), line)):
        if abs(line - row) > NAMES_AWAY:
            break
        for start in beside if line == row else (column, column - len(name) + 1, *beside):
            end = start + len(name)
            if start >= 0 and end <= PLOT_WIDTH and set(rows[line][max(0, start - 1) : end + 1]) == {" "}:
                rows[line][start:end] = name
                return True
    return False


def _place(value: float, values: Sequence[float], size: int) -> int:
    low, high = min(values), max(values)
    return round((value - low) / (high - low) * size) if high > low else 0

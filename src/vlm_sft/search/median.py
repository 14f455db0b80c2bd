"""The median rule: which training is not worth its end."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from vlm_sft.common.formats import number

Curve = Sequence[tuple[float, float]]


def too_poor(curve: Curve, finished: Sequence[Curve], greater: bool, after_trials: int, after_share: float) -> str:
    """Say why a training is not worth its end; "" where it is, or where too little is known.

    The median stopping rule (Golovin et al. 2017, "Google Vizier", section 3.2.2): a trial is stopped where its best
    value so far is worse than the median, over the finished trials, of the mean of their values up to the same point.
    Here a point is a share of the training, so trainings of different lengths compare.

    Args:
        curve: (share of the training done, value) of each evaluation, the newest last.
        finished: the same of the trials that came to their end.
        greater: whether more of the metric is better.
        after_trials: so many finished trials have to be known.
        after_share: so much of the training has to be done, 0 to 1.
    """
    if not curve or not after_share <= curve[-1][0] < 1:
        return ""
    share = curve[-1][0]
    earlier = [[value for done, value in other if done <= share] for other in finished]
    means = [fmean(values) for values in earlier if values]
    if len(means) < max(1, after_trials):
        return ""
    values = [value for _, value in curve]
    best, middle = (max if greater else min)(values), median(means)
    if best >= middle if greater else best <= middle:
        return ""
    return (
        f"after {100 * share:.0f} % of the training its best value, {number(best)}, is worse than the median of "
        f"{len(means)} finished trials, {number(middle)}"
    )

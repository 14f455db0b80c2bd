"""How sure an accuracy or a difference is: intervals, tests, corrections.

Questions about one image are not independent. Wherever `clusters` is taken, it holds one label an item (the image), and
whole images count. With few of them the normal theory claims too much: everything here is built to hold from three
images on (bench/coverage.py measures it). All random draws come from the seed: the same input gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.sign_flips import DRAWS, ROUNDING, SignPatterns, one_sided_p_value

Interval = tuple[float, float]
Scores = Sequence[float] | np.ndarray
LEVEL = 0.05  # of every two-sided test; intervals cover 1 - LEVEL
FEWEST_CLUSTERS = 6  # with fewer, 2 / 2^clusters is not below LEVEL: no result whatever could be significant
BOOTSTRAP_DRAWS = 1000
UNCLEAR = 0.10  # a difference that an interval leaves open and that nobody would call small, in score units
_NORMAL_QUANTILES = 2.8016  # of 0.975 and of a power of 0.8, added


class PairedResult(NamedTuple):
    """A difference between two systems on the same items: second minus first.

    Attributes:
        difference: mean of the paired differences, in score units (0.01 is one point).
        low, high: bounds of its interval; they leave out 0 exactly where `p_value` is below the level.
        p_value: two-sided.
        clusters: how many clusters there are.
        changed: how many of them differ in sum.
    """

    difference: float
    low: float
    high: float
    p_value: float
    clusters: int
    changed: int

    @property
    def too_few(self) -> bool:
        """Whether the sample says nothing: no test could have found a difference, and a large one may be there.

        The test cannot reject with fewer than `FEWEST_CLUSTERS` clusters that changed. Where the others are so many
        that the interval leaves no large difference open, that is a finding; else they are too few to judge.
        """
        wide = max(-self.low, self.high) > UNCLEAR
        return self.clusters < FEWEST_CLUSTERS or (self.changed < FEWEST_CLUSTERS and wide)


def _wilson(share: float, n: float, confidence: float) -> Interval:
    """Wilson's score interval (1927) of a share, for any effective number of items."""
    from scipy.special import ndtri

    z2 = float(ndtri((1 + confidence) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if share == 0 else max(0.0, middle - half)), (1.0 if share == 1 else min(1.0, middle + half))


def _cluster_sums(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the values and the number of items of each cluster; each item is one where there are none."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise EvaluationError(f"{len(values)} scores but {len(clusters)} cluster labels", "give one label an item")
    numbers: dict[Hashable, int] = {}
    labels = np.fromiter((numbers.setdefault(label, len(numbers)) for label in clusters), dtype=np.int64)
    return np.bincount(labels, weights=values), np.bincount(labels).astype(float)


def cluster_of(row: Mapping[str, Any]) -> Hashable:
    """What a row of predictions hangs together with: the image that it is about; a row without one stands alone."""
    return row.get("cluster") or row.get("image") or ("item", row["id"])


def _as_scores(scores: Scores) -> np.ndarray:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or not len(values):
        raise EvaluationError("there are no scores", "score at least one item")
    return values


def _effective_items(sums: np.ndarray, sizes: np.ndarray, variance: float, confidence: float) -> float:
    """How many independent items a sample of clusters is worth.

    The variance of the mean between clusters (jackknife) is compared with that of as many independent items, after Korn
    and Graubard 1998, and Student's quantile stands for what few clusters leave open; clusters of unequal sizes count
    as fewer. Two more clusters that answer as one item each are assumed, as Agresti and Coull 1998 add answers: few
    clusters that are alike by chance must not look independent within.

    Args:
        sums, sizes: (K,) summed values and items of each cluster.
        variance: of single items around their mean.
        confidence: coverage that the number is used for.
    """
    from scipy.special import ndtri, stdtrit

    items, count = float(sizes.sum()), len(sizes)
    alike = items**2 / float(np.square(sizes).sum())  # what it is worth if each cluster answers as one item
    if count == items or variance <= ROUNDING:
        return alike
    if count == 1:
        return ROUNDING  # nothing is known of other clusters
    apart = (sums - sums.sum() / items * sizes) / (1 - sizes / items)
    between = float(np.square(apart).sum()) / items**2 * (count - 1) / count
    between = (count * max(between, variance / items) + 2 * variance / alike) / (count + 2)
    quantile = (1 + confidence) / 2
    known = float(ndtri(quantile) / stdtrit(max(1.0, alike - 1), quantile)) ** 2
    return min(items, known * variance / between)


def bootstrap(
    columns: np.ndarray,
    clusters: Sequence[Hashable] | None,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
) -> tuple[float, Interval]:
    """Give a statistic of sums over items, and its percentile interval over resampled clusters (Efron 1979).

    Args:
        columns: (items, values), summed over the items.
        clusters: one label an item; None takes the items for independent.
        statistic: (draws, values) sums -> (draws,) numbers.
        seed: of the draws.

    Returns:
        The statistic of all items, and (low, high) that hold 95 % of its resampled values.
    """
    sums = np.stack([_cluster_sums(column, clusters)[0] for column in columns.T], axis=1)
    random = np.random.default_rng(seed)
    count, whole = len(sums), sums.sum(axis=0)
    draws = np.stack([sums[random.integers(0, count, count)].sum(axis=0) for _ in range(BOOTSTRAP_DRAWS)])
    low, high = np.quantile(statistic(draws), [LEVEL / 2, 1 - LEVEL / 2])
    return float(statistic(whole[None])[0]), (float(low), float(high))


def _bootstrap_mean(values: np.ndarray, clusters: Sequence[Hashable] | None) -> Interval:
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return bootstrap(columns, clusters, lambda sums: sums[:, 0] / sums[:, 1])[1]


def histogram_interval(counts: Mapping[float, int], confidence: float = 1 - LEVEL) -> Interval:
    """Give the interval of a mean from how often each score occurs: for independent items too many to hold.

    Args:
        counts: score -> number of items with it.
        confidence: coverage, between 0 and 1.

    Returns:
        (low, high), in score units; see `mean_interval`.

    Raises:
        EvaluationError: there are no items.
    """
    values, repeats = _as_scores(list(counts)), np.asarray(list(counts.values()), dtype=float)
    items = float(repeats.sum())
    if float(values.max()) > 1:
        return _bootstrap_mean(np.repeat(values, repeats.astype(int)), None)
    mean = float(values @ repeats) / items
    variance = float(np.square(values - mean) @ repeats) / items
    return _graded_wilson(mean, variance, items, items, confidence)


def _graded_wilson(mean: float, variance: float, effective: float, clusters: float, confidence: float) -> Interval:
    """Wilson's interval, for graded scores with the number of items of 0 and 1 that would be as sure."""
    binary = mean * (1 - mean)
    if not 0 < mean < 1:
        return _wilson(min(1.0, max(0.0, mean)), effective, confidence)
    # One more cluster that is right or wrong altogether: scores that happen to be alike must not claim certainty.
    return _wilson(mean, effective * binary / min(binary, variance + binary / clusters), confidence)


def mean_interval(
    scores: Scores, clusters: Sequence[Hashable] | None = None, confidence: float = 1 - LEVEL
) -> Interval:
    """Give the interval of a mean score: Wilson's, with the number of independent items that the sample is worth.

    Source: Wilson 1927 for independent scores of 0 and 1; Korn and Graubard 1998 and Dean and Pagano 2015 for the
    effective number of items of a clustered sample, which Student's quantile with one degree of freedom less than
    clusters makes smaller.

    Args:
        scores: one number an item; Wilson's interval is for 0 to 1, and numbers above (CIDEr) have that of `bootstrap`,
            at 95 %.
        clusters: one label an item; None takes the items for independent.
        confidence: coverage, between 0 and 1.

    Returns:
        (low, high), in score units.

    Raises:
        EvaluationError: there are no scores, or not one label an item.
    """
    values = _as_scores(scores)
    if float(values.max()) > 1:
        return _bootstrap_mean(values, clusters)
    sums, sizes = _cluster_sums(values, clusters)
    variance = float(values.var())
    effective = _effective_items(sums, sizes, variance, confidence)
    return _graded_wilson(float(values.mean()), variance, effective, len(sizes), confidence)


def _differences(a: Scores, b: Scores) -> np.ndarray:
    if len(a) != len(b):
        raise EvaluationError(f"cannot pair {len(a)} scores with {len(b)}", "score both systems on the same items")
    differences: np.ndarray = _as_scores(b) - _as_scores(a)
    return differences


def _score_bounds(differences: np.ndarray, effective: float) -> Interval:
    """The score interval of a mean difference, whose variance grows with the difference that is tried.

    A true mean of delta needs a share of |delta| of changed items at least, whether they showed or not; where nothing
    changed, the bounds are those of Wilson for no success. After Tango 1998, with the observed share of changed items
    in place of the constrained estimate.
    """
    from scipy.special import ndtri

    z2 = float(ndtri(1 - LEVEL / 2)) ** 2
    mean, square = float(differences.mean()), float(np.square(differences).mean())
    size = square / float(np.abs(differences).mean()) if square else 1.0  # of a change
    ends = []
    # (mean - delta)^2 * effective = z2 * (second moment - delta^2), for three lower bounds of the second moment
    for linear, constant in ((0.0, square), (size, 0.0), (-size, 0.0)):
        middle = effective * mean + z2 * linear / 2
        root = middle**2 - (effective + z2) * (effective * mean**2 - z2 * constant)
        ends += [(middle + sign * math.sqrt(max(0.0, root))) / (effective + z2) for sign in (-1, 1) if root >= 0]
    return min(ends), max(ends)


def paired_test(a: Scores, b: Scores, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> PairedResult:
    """Test whether two systems differ on the same items, and give the interval that belongs to the test.

    Test: the randomisation test that turns whole clusters round (Fisher 1935). Where the systems are alike, a cluster's
    difference is as likely to have the other sign; the p-value is the share of all sign patterns that are as far out as
    the observed one. On independent items scored 0 or 1 this is McNemar's exact test. It is exact for whole sums and up
    to 16 clusters, else it is drawn 10,000 times.

    Interval: the differences that this test does not reject (Hartigan 1969), widened to the score interval (Tango 1998)
    for the effective number of items where that reaches farther: sign flips know no variation but what happened to
    show. Widening never contradicts the test, so that 0 is left out exactly where p < 0.05. With fewer than
    `FEWEST_CLUSTERS` clusters nothing can be rejected, and the interval is everything possible.

    Args:
        a: scores of the first system, one an item, 0 to 1.
        b: scores of the second system on the same items in the same order.
        clusters: one label an item; None takes the items for independent.
        seed: of the draws.

    Returns:
        mean(b) - mean(a), its 95 % interval and its p-value.

    Raises:
        EvaluationError: there are no items, the lengths differ, or not one label an item.
    """
    difference = _differences(a, b)
    sign = -1.0 if difference.mean() < 0 else 1.0  # what follows has to look at one direction only
    difference = sign * difference
    mean, most = float(difference.mean()), max(1.0, float(np.abs(difference).max()))
    sums, sizes = _cluster_sums(difference, clusters)
    patterns = SignPatterns(sums, sizes, seed)
    p_value = min(1.0, 2 * one_sided_p_value(sums, patterns)) if mean > ROUNDING / len(difference) else 1.0
    low, high = -most, most
    if len(sums) >= FEWEST_CLUSTERS:
        flips = patterns.bounds(LEVEL / 2)
        wide = _score_bounds(difference, _effective_items(sums, sizes, float(difference.var()), 1 - LEVEL))
        low, high = max(-most, min(flips[0], wide[0])), min(most, max(flips[1], wide[1]))
        low = min(low, 0.0) if p_value >= LEVEL else low if low > 0 else max(flips[0], mean / DRAWS)
    if sign < 0:
        low, high = -high, -low
    return PairedResult(sign * mean, low, high, p_value, len(sums), int((np.abs(sums) > ROUNDING).sum()))


def loss_exceeds(
    a: Scores, b: Scores, allowed: float, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """Test whether the second system lost more than allowed against the first on the same items, one-sided.

    The sign-flip test of `paired_test`, for a true difference of `-allowed`.

    Args:
        a: scores of the first system, one an item.
        b: scores of the second system on the same items in the same order.
        allowed: the mean loss that is no finding, in score units (0.02 is two points), at least 0.
        clusters: one label an item; None takes the items for independent.
        seed: of the draws.

    Returns:
        The p-value of the hypothesis that mean(a) - mean(b) <= allowed; small when the loss is larger. It is never
        below 0.5 to the power of the number of clusters.

    Raises:
        EvaluationError: there are no items, the lengths differ, or not one label an item.
    """
    sums, sizes = _cluster_sums(-_differences(a, b), clusters)
    patterns = SignPatterns(sums, sizes, seed)
    return one_sided_p_value(sums, patterns) if allowed == 0 else patterns.p_value(allowed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons so that the chance of any false finding stays at the level.

    Source: Holm 1979: the i-th smallest of m is multiplied by m - i + 1, kept in order, and cut at 1.

    Args:
        p_values: one a comparison.

    Returns:
        The adjusted values in the order given; compare each with the level itself.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def discordance(a: Scores, b: Scores, clusters: Sequence[Hashable] | None = None) -> float:
    """Give the mean squared paired difference, the quantity that limits what a paired comparison can show.

    For scores of 0 and 1 on independent items it is the share on which the two systems disagree. With clusters the
    differences of a cluster are added before squaring, so items that change together count as fewer.

    Args:
        a: scores of the first system, one an item.
        b: scores of the second system, in the same order.
        clusters: one label an item, or None.

    Returns:
        Sum over clusters of (summed difference) squared, divided by the number of items.

    Raises:
        EvaluationError: there are no items, the lengths differ, or not one label an item.
    """
    sums, sizes = _cluster_sums(_differences(a, b), clusters)
    return float(np.square(sums).sum() / sizes.sum())


def smallest_detectable_difference(n: int, discordance: float, clusters: int | None = None) -> float:
    """Give the smallest true difference that a paired comparison of this size would find in four cases of five.

    Source: the normal approximation of the paired test (Miettinen 1968; Connor 1987, first order): the two normal
    quantiles times sqrt(discordance / n). Never below what an exact test needs to reject at all (six items changed, all
    the same way), so two systems that hardly disagree do not look infinitely well measured.

    Args:
        n: number of items.
        discordance: mean squared paired difference; see `discordance`.
        clusters: how many clusters the items form; None takes them for independent.

    Returns:
        A difference in score units (0.05 is five points), at most 1; 1 where no difference could be found.

    Raises:
        EvaluationError: there are no items.
    """
    if n < 1:
        raise EvaluationError("no difference can be detected without items", "score at least one item")
    if clusters is not None and clusters < FEWEST_CLUSTERS:
        return 1.0
    return min(1.0, max(_NORMAL_QUANTILES * math.sqrt(discordance / n), FEWEST_CLUSTERS / n))


def items_needed(difference: float, discordance: float) -> int:
    """Give how many items a paired comparison needs to find a difference in four cases of five.

    The inverse of `smallest_detectable_difference`.

    Args:
        difference: the true difference, in score units, not 0.
        discordance: mean squared paired difference; see `discordance`.
    """
    size = abs(difference)
    return math.ceil(max(discordance * (_NORMAL_QUANTILES / size) ** 2, FEWEST_CLUSTERS / size) - ROUNDING)

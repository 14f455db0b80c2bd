"""The sign-flip test of clusters: every set of clusters turned round, or a sample of them."""

from __future__ import annotations

import math

import numpy as np

ENUMERATED = 16  # clusters up to which every pattern of signs is looked at
DRAWS = 10_000  # patterns of signs, beyond
ROUNDING = 1e-9  # sums of scores that differ by less are equal
_DRAWN_AT_ONCE = 2_000_000  # numbers held in memory at a time: 16 MB


class SignPatterns:
    """All sets of clusters that can keep their sign while the others are turned round, or a seeded sample of them.

    With every difference shifted by delta, turning a set of clusters round gives a sum at least as large as the
    observed one exactly where the mean over that set is at most delta (Hartigan 1969): one list of means of sets
    answers for every delta.

    Args:
        sums, sizes: (K,) summed differences and items of each cluster.
        seed: of the draws where there are more than `ENUMERATED` clusters.
    """

    def __init__(self, sums: np.ndarray, sizes: np.ndarray, seed: int) -> None:
        self._drawn = len(sums) > ENUMERATED  # a drawn test counts the observed pattern as one more
        if self._drawn:
            self._sums, self._sizes = _drawn_sets(sums, sizes, seed)
        else:
            sets = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1).astype(float)
            self._sums, self._sizes = sets @ sums, sets @ sizes
        self._total = len(self._sums) + self._drawn

    def p_value(self, delta: float) -> float:
        """The one-sided p-value of a true mean of at most `delta`."""
        return (int(np.count_nonzero(self._sums <= delta * self._sizes + ROUNDING)) + self._drawn) / self._total

    def bounds(self, level: float) -> tuple[float, float]:
        """The smallest and the largest delta that neither one-sided test at `level` rejects, perhaps infinite."""
        needed = max(1, math.ceil(level * self._total - ROUNDING) - self._drawn)
        empty = self._sizes == 0  # no cluster is turned round: as extreme as observed, whatever delta
        means = self._sums / np.where(empty, 1.0, self._sizes)
        low = np.partition(np.where(empty, -np.inf, means), needed - 1)[needed - 1]
        high = np.partition(np.where(empty, np.inf, means), -needed)[-needed]
        return float(low), float(high)


def _drawn_sets(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of random sets of clusters, each in it with probability one half.

    Clusters with the same sum and size are exchangeable: how many of a kind are in the set is one binomial draw, at a
    cost that does not grow with their number. Those that are alone are one random bit each.
    """
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    alone, several, repeats = kinds[counts == 1], kinds[counts > 1], counts[counts > 1]
    step = max(1, _DRAWN_AT_ONCE // len(kinds))
    found = []
    for start in range(0, DRAWS // 2, step):
        draws = min(step, DRAWS // 2 - start)
        bits = np.unpackbits(rng.integers(0, 256, (draws, -(-len(alone) // 8)), dtype=np.uint8), axis=1)
        picked = rng.binomial(repeats, 0.5, size=(draws, len(several)))
        found.append(bits[:, : len(alone)] @ alone + picked @ several)
    drawn = np.concatenate(found)
    whole = np.array([sums.sum(), sizes.sum()])
    return tuple(np.concatenate([drawn, whole - drawn]).T)  # each set, and the clusters that it leaves out


def one_sided_p_value(sums: np.ndarray, patterns: SignPatterns) -> float:
    """The p-value of "no difference" against a mean above zero.

    Where the sums are whole, the distribution of the flipped sum is built exactly: m clusters that changed by s add s
    times a binomial variable. For changes of one item each it is the sign test, that is McNemar's exact test.

    Args:
        sums: (K,) summed differences of each cluster.
        patterns: of the same clusters, for sums that are not whole.
    """
    from scipy.stats import binom

    sums = sums[np.abs(sums) > ROUNDING]  # the others are the same turned round
    whole = np.rint(sums)
    if np.abs(sums - whole).max(initial=0.0) > ROUNDING:
        few = len(sums) <= ENUMERATED
        return (SignPatterns(sums, np.ones(len(sums)), 0) if few else patterns).p_value(0.0)
    chances = np.ones(1)
    for size, count in zip(*np.unique(np.abs(whole).astype(int), return_counts=True), strict=True):
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spaced)
    return min(1.0, float(chances[max(0, len(chances) // 2 + int(whole.sum())) :].sum()))

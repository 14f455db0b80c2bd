"""Intervals and tests, by seeded simulation and against SciPy."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import coverage
from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.statistics import (
    discordance,
    histogram_interval,
    holm,
    loss_exceeds,
    mean_interval,
    paired_test,
    smallest_detectable_difference,
)


def clustered_scores(rng, clusters, size, share):
    """Scores of 0 and 1 in which the items of a cluster are alike four times in five."""
    common = rng.random(clusters) < share
    own = rng.random((clusters, size)) < share
    copies = rng.random((clusters, size)) < 0.8
    scores = np.where(copies, common[:, None], own).astype(float)
    return scores.reshape(-1), np.repeat(np.arange(clusters), size).tolist()


def wilson(successes, n):
    return stats.binomtest(successes, n).proportion_ci(method="wilson")


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (67, 100), (1, 1), (2194, 2500)])
def test_the_interval_of_a_share_is_wilsons(successes, n):
    expected = pytest.approx(wilson(successes, n), abs=1e-12)
    assert mean_interval([1.0] * successes + [0.0] * (n - successes)) == expected
    assert histogram_interval({1.0: successes, 0.0: n - successes}) == expected


def test_coverage_of_a_share():
    rng = np.random.default_rng(1)
    counts, repeats = np.unique(rng.binomial(60, 0.85, size=20_000), return_counts=True)
    intervals = (histogram_interval({1.0: int(k), 0.0: 60 - int(k)}) for k in counts)
    assert 0.93 <= np.average([low <= 0.85 <= high for low, high in intervals], weights=repeats) <= 0.97


def test_mean_interval_is_wilsons_where_items_stand_alone():
    binary, graded = [1.0] * 30 + [0.0] * 10, [0.3, 0.6, 1.0, 0.9] * 500
    assert mean_interval(binary) == mean_interval(binary, list(range(40)))
    expected = stats.t.interval(0.95, 1999, np.mean(graded), stats.sem(graded))
    assert mean_interval(graded) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("size", [1, 4, 10])
def test_with_thousands_of_items_the_interval_is_that_of_resampling_clusters(size):
    rng = np.random.default_rng(2)
    scores, clusters = clustered_scores(rng, clusters=4000 // size, size=size, share=0.7)
    means = scores.reshape(-1, size).mean(1)
    resampled = [rng.choice(means, len(means)).mean() for _ in range(4000)]
    assert mean_interval(scores, clusters) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.003)


def test_mean_interval_does_not_depend_on_order_or_label_names():
    rng = np.random.default_rng(4)
    scores, clusters = clustered_scores(rng, clusters=20, size=3, share=0.6)
    order, renamed = rng.permutation(60), [f"image {label}" for label in clusters]
    found = mean_interval(scores[order], [renamed[index] for index in order])
    assert found == pytest.approx(mean_interval(scores, clusters), abs=1e-12)


def test_mean_interval_never_claims_certainty_from_clusters_that_are_alike():
    clusters = [index // 4 for index in range(40)]
    assert mean_interval([1.0] * 40, clusters) == pytest.approx(wilson(10, 10))
    assert mean_interval([0.0] * 40, clusters) == pytest.approx(wilson(0, 10))
    low, high = mean_interval([1.0, 0.0] * 20, clusters)  # each image half right
    assert high - low > 0.3
    low, high = mean_interval([0.9] * 10)
    assert low < 0.85 < 0.93 < high
    assert mean_interval([1.0, 0.0], ["one", "one"]) == pytest.approx((0.0, 1.0), abs=1e-6)


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=1, max_size=30))
def test_histogram_interval_equals_the_interval_of_the_items(scores):
    counts = {score: scores.count(score) for score in set(scores)}
    assert histogram_interval(counts) == pytest.approx(mean_interval(scores), abs=1e-9)


def test_four_images_are_too_few_to_judge():
    """The case that was reported: +40 points, p = 0.125, and an interval that left out 0."""
    found = paired_test([0.0] * 10, [1, 0, 0, 1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 2, 2, 3, 3, 3])
    assert found == (pytest.approx(0.4), -1.0, 1.0, 0.125, 4, 4)
    assert found.too_few


@pytest.mark.parametrize(
    ("images", "gained", "too_few"),
    [
        (5, 5, True),
        (6, 6, False),
        (6, 5, True),
        (10, 4, True),
        (10, 0, True),
        (100, 3, False),
        (100, 0, False),
        (1, 1, True),
    ],
)
def test_too_few_are_those_that_could_show_nothing_and_exclude_nothing(images, gained, too_few):
    found = paired_test([0.0] * images, [1.0] * gained + [0.0] * (images - gained))
    assert found.too_few is too_few


def sign_test(a, b):
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    changed = int((difference != 0).sum())
    return float(stats.binomtest(int((difference > 0).sum()), changed).pvalue) if changed else 1.0


def test_on_single_items_the_test_is_mcnemars():
    a = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert paired_test(a, b).p_value == pytest.approx(sign_test(a, b))
    assert paired_test(b, a).p_value == pytest.approx(sign_test(a, b))
    rng = np.random.default_rng(8)
    for size in (20, 300, 3000):
        one, two = (rng.random((2, size)) < 0.7).astype(float)
        assert paired_test(one, two).p_value == pytest.approx(sign_test(one, two), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, -0.6, 0.0, 0.3, 1.0, 2.0]), min_size=1, max_size=9))
def test_p_value_is_the_share_of_all_sign_patterns(sums):
    clusters = [index for index in range(len(sums)) for _ in range(3)]
    differences = np.repeat(np.array(sums) / 3, 3)
    patterns = np.array(list(itertools.product([-1, 1], repeat=len(sums)))) @ np.array(sums)
    share = np.mean(np.abs(patterns) >= abs(sum(sums)) - 1e-9)
    assert paired_test(np.zeros(len(clusters)), differences, clusters).p_value == pytest.approx(share)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_interval_and_test_never_disagree(data):
    """Interval leaves out 0 exactly where p < 0.05: graded and binary scores, all numbers and sizes of clusters."""
    images = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=images, max_size=images))
    levels = data.draw(st.sampled_from([(0.0, 1.0), (0.0, 0.3, 0.6, 0.9, 1.0), (0.0, 0.123, 0.77)]))
    better = data.draw(st.floats(0, 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    clusters = np.repeat(np.arange(images), sizes).tolist()
    a = rng.choice(levels, len(clusters))
    b = np.where(rng.random(len(clusters)) < better, np.maximum(a, rng.choice(levels, len(clusters))), a)
    found, turned = paired_test(a, b, clusters), paired_test(b, a, clusters)
    assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert turned == pytest.approx((-found.difference, -found.high, -found.low, *found[3:]))


def test_ends_of_the_interval_are_rejected_by_the_test_beyond_them():
    """Inverting by hand: shifted by a little more than an end, every difference is rejected at 5 %."""
    rng = np.random.default_rng(9)
    sizes = rng.integers(1, 5, 11)
    clusters = np.repeat(np.arange(11), sizes)
    difference = rng.choice([-1.0, 0.0, 1.0], len(clusters), p=[0.2, 0.3, 0.5])
    found = paired_test(np.zeros(len(difference)), difference, clusters.tolist())
    signs = np.array(list(itertools.product([-1, 1], repeat=11)))

    def p_value(delta):
        sums = np.bincount(clusters, difference - delta)
        return np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9)

    assert p_value(found.low - 1e-6) < 0.05 and p_value(found.high + 1e-6) < 0.05
    inside = [delta for delta in np.linspace(-1, 1, 401) if p_value(delta) >= 0.05]
    assert found.low - 1e-9 <= min(inside) and max(inside) <= found.high + 1e-9


def test_paired_test_agrees_with_the_t_test_on_many_items():
    rng = np.random.default_rng(6)
    a = rng.random(500)
    b = a + rng.normal(0.01, 0.1, size=500)
    result, expected = paired_test(a, b), stats.ttest_rel(b, a)
    assert result.p_value == pytest.approx(expected.pvalue, abs=0.01)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.002)
    assert paired_test(a, a).difference == 0 and paired_test(a, a).p_value == 1.0


def test_false_positive_rate_with_clusters():
    rng = np.random.default_rng(7)
    found_by_clusters, found_by_items, trials = 0, 0, 300
    for _ in range(trials):
        a, clusters = clustered_scores(rng, clusters=100, size=5, share=0.6)
        b, _ = clustered_scores(rng, clusters=100, size=5, share=0.6)
        found_by_clusters += paired_test(a, b, clusters).p_value < 0.05
        found_by_items += paired_test(a, b).p_value < 0.05
    assert 0.02 <= found_by_clusters / trials <= 0.09
    assert found_by_items / trials > 0.12


@pytest.mark.parametrize("images", [3, 5, 6, 8, 12, 20, 30])
def test_intervals_hold_the_truth_with_few_images(images):
    """Unequal images, answers that hang together: the simulation of bench/coverage.py, smaller."""
    for world in (coverage.WORLDS[1], coverage.WORLDS[4]):
        found = coverage.cell(world, images, 0.3, trials=120, seed=1)
        assert found["difference"] >= 0.92 and found["accuracy"] >= 0.92
        assert found["disagree"] == 0
        assert found["percentile"] < found["difference"]  # what this replaced


def test_intervals_of_ten_thousand_questions_take_no_time():
    rng = np.random.default_rng(11)
    a = rng.random(10_000)
    began = time.process_time()
    paired_test(a, np.clip(a + rng.normal(0, 0.1, 10_000), 0, 1))  # the slowest case: every difference is another
    assert time.process_time() - began < 20.0  # a slip to quadratic work takes longer


@given(st.lists(st.floats(min_value=0, max_value=1), max_size=8))
def test_holm_equals_the_step_down_procedure(p_values):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
            if p_values[index] * (len(p_values) - rank) > level:
                break
            rejected.add(index)
        assert {index for index, value in enumerate(adjusted) if value <= level} == rejected


def test_holm_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_discordance_counts_disagreement():
    a, b = [0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1]
    assert discordance(a, b) == pytest.approx(3 / 6)
    assert discordance(a, b, ["x", "x", "y", "y", "z", "x"]) == pytest.approx((2**2 + 1) / 6)


def test_smallest_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(9)
    n, disagreeing = 1000, 0.1
    difference = smallest_detectable_difference(n, disagreeing)
    assert difference == pytest.approx((1.959964 + 0.841621) * math.sqrt(disagreeing / n), rel=1e-5)
    shares = [(disagreeing + difference) / 2, (disagreeing - difference) / 2, 1 - disagreeing]
    gained, lost, _ = rng.multinomial(n, shares, size=500).T
    found = [stats.binomtest(int(k), int(k + m)).pvalue < 0.05 for k, m in zip(gained, lost, strict=True)]
    assert 0.72 <= np.mean(found) <= 0.86


def test_smallest_detectable_difference_of_known_samples():
    """ChartQA-200 and TextVQA-100 slices cannot show less than about 4.9 and 9.9 points."""
    assert smallest_detectable_difference(200, 0.0613) == pytest.approx(0.049, abs=0.0005)
    assert smallest_detectable_difference(100, 0.125) == pytest.approx(0.099, abs=0.0005)


def test_systems_that_never_disagree_are_not_infinitely_well_measured():
    assert smallest_detectable_difference(100, 0.0) == pytest.approx(0.06)
    six, five = ([1.0] * changed + [0.0] * (100 - changed) for changed in (6, 5))
    assert paired_test([0.0] * 100, six).p_value < 0.05 < paired_test([0.0] * 100, five).p_value
    assert smallest_detectable_difference(3, 1.0) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([]),
        lambda: histogram_interval({}),
        lambda: paired_test([], []),
        lambda: paired_test([1.0], [1.0, 0.0]),
        lambda: mean_interval([1.0, 0.0], ["one label"]),
        lambda: smallest_detectable_difference(0, 0.1),
    ],
)
def test_impossible_input_is_an_evaluation_error(call):
    with pytest.raises(EvaluationError):
        call()


@pytest.mark.parametrize("loss", [0.0, 0.02])
def test_a_loss_at_the_edge_of_what_is_allowed_is_rarely_called_larger(loss: float) -> None:
    """False-positive rate at the 5 % level over 200 simulated pairs of 200 items, two an image."""
    random = np.random.default_rng(5)
    rejected = 0
    for _ in range(200):
        flips = random.choice([-1.0, 0.0, 1.0], size=(100,), p=[0.1 + loss, 0.8 - loss, 0.1])
        difference = np.repeat(flips, 2)  # both questions of an image change together
        before = np.where(difference < 0, 1.0, np.where(difference > 0, 0.0, 1.0))
        p_value = loss_exceeds(before, before + difference, loss, [number // 2 for number in range(200)])
        rejected += p_value < 0.05
    assert rejected / 200 < 0.09


def test_a_loss_far_beyond_what_is_allowed_is_found() -> None:
    before = [1.0] * 100
    after = [1.0] * 80 + [0.0] * 20
    assert loss_exceeds(before, after, 0.02) < 0.001
    assert loss_exceeds(before, after, 0.20) > 0.3
    assert loss_exceeds(after, before, 0.0) > 0.99


def test_few_lost_items_are_no_finding() -> None:
    before = [1.0] * 100
    after = [0.0] * 4 + [1.0] * 96
    assert loss_exceeds(before, after, 0.0) == pytest.approx(0.5**4)

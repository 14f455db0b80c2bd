"""What holds for every plan of an epoch, whatever the data, the batch size, the ranks and the budget."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.questions import PROMPT, questions
from tests.tiny_models import build
from vlm_sft.common.errors import DataError
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.epoch_order import conversations, global_batches
from vlm_sft.data.loader import StepDataset
from vlm_sft.data.packing import (
    LEAST_SHARE,
    Bundle,
    EpochPlanner,
    GroupLengths,
    Step,
    bundle_tokens,
    pack_batch,
    row_tokens,
)
from vlm_sft.forecast.flops import epoch_work


@st.composite
def images(draw: st.DrawFn, most: int = 12) -> GroupLengths:
    count = draw(st.integers(1, most))
    tokens = draw(st.lists(st.integers(2, 60), min_size=count, max_size=count))
    return GroupLengths(draw(st.integers(4, 400)), tuple(tokens), tuple(1 + size // 4 for size in tokens))


@st.composite
def planners(draw: st.DrawFn) -> EpochPlanner:
    return EpochPlanner(
        lengths=tuple(draw(st.lists(images(), min_size=1, max_size=25))),
        global_batch_size=draw(st.integers(1, 40)),
        tokens_per_pack=draw(st.integers(1, 1500)),
        world_size=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 5)),
        max_questions_per_image=draw(st.none() | st.integers(1, 6)),
        max_questions_per_pack=draw(st.none() | st.integers(1, 6)),
        share_images=draw(st.booleans()),
        rows=draw(st.sampled_from([None, None, "padded", "equal", "single"])),
        packing=draw(st.booleans()),
    )


def packs_of(step: Step) -> list[tuple[Bundle, ...]]:
    return [pack for packs in step.ranks for pack in packs]


def asked(step: Step) -> list[tuple[int, int]]:
    return sorted((b.group, q) for pack in packs_of(step) for b in pack for q in b.questions)


@settings(max_examples=80, deadline=None)
@given(planners(), st.integers(0, 3))
def test_every_question_once_in_full_batches(planner: EpochPlanner, epoch: int) -> None:
    steps = planner.epoch(epoch)
    everything = [(group, q) for group, size in enumerate(planner.lengths) for q in range(len(size.questions))]
    assert sorted(item for step in steps for item in asked(step)) == everything
    assert len(steps) == planner.steps_per_epoch
    assert all(step.questions == planner.global_batch_size for step in steps[:-1])
    for step in steps:
        assert step.questions == len(asked(step))
        assert step.supervised == sum(planner.lengths[group].supervised[q] for group, q in asked(step))


@settings(max_examples=80, deadline=None)
@given(planners())
def test_packs_keep_their_limits_and_ranks_stay_in_step(planner: EpochPlanner) -> None:
    for step in planner.epoch(0):
        assert len(step.ranks) == planner.world_size
        assert len({len(packs) for packs in step.ranks}) == 1
        for pack in packs_of(step):
            counts = [len(bundle.questions) for bundle in pack]
            assert all(counts)
            if planner.max_questions_per_pack:
                assert sum(counts) <= planner.max_questions_per_pack
            if not planner.share_images:
                assert set(counts) <= {1}
            rows = sorted(size for b in pack for size in row_tokens(b, planner.lengths[b.group]))
            if planner.rows == "equal":
                assert len(set(rows)) <= 1
            if planner.rows and (planner.rows == "single" or not planner.packing):
                assert len(rows) <= 1
            if planner.rows and len(rows) > 1:
                assert len(rows) * rows[-1] <= planner.tokens_per_pack and rows[0] >= LEAST_SHARE**2 * rows[-1]
            elif len(rows) > 1 and planner.packing:  # one question that is too long for the budget is a pack of its own
                assert sum(bundle_tokens(b, planner.lengths[b.group]) for b in pack) <= planner.tokens_per_pack


def test_separate_questions_fill_padded_batches_of_similar_length() -> None:
    short, long = GroupLengths(100, (10,) * 8, (2,) * 8), GroupLengths(300, (12,) * 8, (2,) * 8)
    planner = EpochPlanner((short, long, short), 24, 1000, 1, 0).computed_as("padded")
    (step,) = planner.epoch(0)
    packs = [(sum(len(b.questions) for b in pack), {b.group for b in pack}) for pack in packs_of(step)]
    # 3 rows of 312 tokens, 9 of 110: no batch mixes them, and no image is cut that fits.
    assert sorted(packs, key=str) == [(2, {1}), (3, {1}), (3, {1}), (8, {0}), (8, {2})]
    assert epoch_work(planner, [90, 290, 90]).total.tokens == 8 * 312 + 16 * 110
    two = EpochPlanner((short, long, short), 24, 10_000, 2, 0).computed_as("padded")
    (step,) = two.epoch(0)
    assert [[sum(len(b.questions) for b in pack) for pack in packs] for packs in step.ranks] == [[8], [16]]


@settings(max_examples=60, deadline=None)
@given(planners(), st.integers(1, 4), st.integers(1, 3000), st.none() | st.integers(1, 6), st.integers(0, 2))
def test_batches_do_not_depend_on_ranks_or_budgets(
    planner: EpochPlanner, world_size: int, budget: int, most: int | None, epoch: int
) -> None:
    other = EpochPlanner(
        planner.lengths,
        planner.global_batch_size,
        budget,
        world_size,
        planner.seed,
        planner.max_questions_per_image,
        most,
        not planner.share_images,
    )
    assert [asked(step) for step in planner.epoch(epoch)] == [asked(step) for step in other.epoch(epoch)]
    assert planner.epoch(epoch) == planner.epoch(epoch)


def test_seed_and_epoch_change_the_order() -> None:
    lengths = tuple(GroupLengths(50, (10,) * 6, (2,) * 6) for _ in range(20))
    planner = EpochPlanner(lengths, 16, 500, 1, 0)
    orders = [[asked(step) for step in planner.epoch(epoch)] for epoch in range(3)]
    orders.append([asked(step) for step in EpochPlanner(lengths, 16, 500, 1, 1).epoch(0)])
    assert all(left != right for index, left in enumerate(orders) for right in orders[:index])


@settings(max_examples=40, deadline=None)
@given(st.lists(images(4), min_size=24, max_size=60), st.integers(1, 4), st.integers(700, 2000))
def test_ranks_are_loaded_evenly(lengths: list[GroupLengths], world_size: int, budget: int) -> None:
    """Longest first: no pack is above the mean by more than one bundle, so ranks differ by little."""
    planner = EpochPlanner(tuple(lengths), 48, budget, world_size, 0)
    for step in planner.epoch(0)[:-1]:
        largest = max(bundle_tokens(b, lengths[b.group]) for pack in packs_of(step) for b in pack)
        loads = [sum(bundle_tokens(b, lengths[b.group]) for b in pack) for pack in packs_of(step)]
        assert max(loads) <= sum(loads) / len(loads) + largest


def test_the_balance_of_a_typical_step() -> None:
    """ChartQA-like lengths on eight ranks: the busiest rank computes at most 15 % more than the mean."""
    lengths = [GroupLengths(300 + 37 * (i % 9), (30 + i % 7,) * (1 + i % 3), (4,) * (1 + i % 3)) for i in range(400)]
    planner = EpochPlanner(tuple(lengths), 64, 2048, 8, 0)
    for step in planner.epoch(0)[:-1]:
        loads = [sum(bundle_tokens(b, lengths[b.group]) for pack in packs for b in pack) for packs in step.ranks]
        assert max(loads) <= 1.15 * sum(loads) / len(loads)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 32), st.integers(1, 8), st.integers(0, 2))
def test_the_cap_holds_while_there_are_other_images(sizes: list[int], batch_size: int, cap: int, epoch: int) -> None:
    batches = global_batches(sizes, batch_size, 0, epoch, cap)
    allowed = max(cap, -(-batch_size // len(sizes)))
    left = Counter(dict(enumerate(sizes)))
    for batch in batches:
        counts = Counter[int]()
        for bundle in batch:
            counts[bundle.group] += len(bundle.questions)
        # More than that only where all that is left of the epoch, each image at the cap, cannot fill the batch.
        if sum(min(allowed, count) for count in left.values()) >= batch_size:
            assert max(counts.values()) <= allowed
        left -= counts
    assert not +left


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=120), st.integers(1, 40), st.integers(0, 3))
def test_fitting_bundles_into_batches_cuts_fewer_of_them(sizes: list[int], batch_size: int, epoch: int) -> None:
    """Never more images in two batches than there are ends of batches; none where questions come one an image."""
    batches = global_batches(sizes, batch_size, 0, epoch)
    pieces = Counter(bundle.group for batch in batches for bundle in batch)
    least = {group: -(-size // batch_size) for group, size in enumerate(sizes)}
    assert sum(pieces[group] - least[group] for group in pieces) <= len(batches) - 1
    assert [sum(len(bundle.questions) for bundle in batch) for batch in batches[:-1]] == [batch_size] * (
        len(batches) - 1
    )


def test_images_with_few_questions_are_computed_in_one_step_each() -> None:
    sizes = [1 + number % 3 for number in range(600)]
    batches = global_batches(sizes, 16, 5, 0)
    assert sum(len(batch) for batch in batches) == len(sizes), "an image stands in two batches"
    drawn = [bundle.group for batch in batches for bundle in batch]
    assert drawn != sorted(drawn)
    assert drawn != [bundle.group for batch in global_batches(sizes, 16, 5, 1) for bundle in batch]


def test_one_image_never_fills_a_batch_under_a_cap() -> None:
    batches = global_batches([100] + [2] * 300, 20, 3, 0, 4)
    counts = [Counter(b.group for b in batch for _ in b.questions)[0] for batch in batches]
    assert max(counts) == 4
    assert sum(counts) == 100


def test_no_questions_is_said() -> None:
    with pytest.raises(DataError, match="no questions to train on"):
        EpochPlanner((), 4, 100, 1, 0)


def test_a_rank_without_work_keeps_in_step_with_weight_zero() -> None:
    _, processor = build("qwen2_5_vl")
    data = PreparedData(questions(0, 3), Encoder(processor, PROMPT), "encoding")
    planner = EpochPlanner(data.lengths, 2, 10_000, 2, 0).computed_as("single")
    weights = []
    for rank in range(2):
        steps = StepDataset(data, planner, rank)
        assert len(steps) == 2
        last = steps[0, 1]
        assert (last.questions, len(last.packs)) == (1, 1)
        assert len(last.packs[0].sample_ids) == 1
        weights.append(last.packs[0].weight)
    assert sorted(weights) == [0.0, 1.0]


def test_conversations_stay_whole_and_cost_their_last_turn() -> None:
    assert conversations((3, 1, 0, 2), (-1, 0, 1, 0)) == [(0, 1, 2), (3,)]
    assert conversations((2, 0), (-1, 0, 1)) == [(0, 2)]
    assert conversations((1, 1), ()) == [(1,), (1,)]
    turns = GroupLengths(10, tuple(20 * n for n in range(1, 9)), (2,) * 8, follows=(-1, 0, 1, 2, 3, 4, 5, 6))
    lengths = [turns, GroupLengths(30, (15, 15), (2, 2))]
    whole = Bundle(0, (4, 2, 0, 1, 3, 7, 6, 5))
    assert bundle_tokens(whole, turns) == 10 + 160
    (packs,) = pack_batch([whole, Bundle(1, (0, 1))], lengths, 1, 240)
    assert [sorted(bundle.group for bundle in pack) for pack in packs] == [[0, 1]]
    (packs,) = pack_batch([whole], lengths, 1, 240, max_questions_per_pack=3)
    assert sorted(len(bundle.questions) for pack in packs for bundle in pack) == [2, 3, 3]
    assert sorted(q for pack in packs for bundle in pack for q in bundle.questions) == list(range(8))

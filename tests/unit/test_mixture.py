import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.common.errors import DataError
from vlm_sft.data.mixture import mix, stratified_limit, weighted
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets, parse_loss_weights

ROOT = Path(__file__).resolve().parents[2]


def questions(name: str, count: int, per_image: int = 3, split: str = "", kind: str = "") -> list[Sample]:
    metadata = {"question_type": kind} if kind else {}
    return [
        Sample(
            f"{name}/{split}{kind}{n:05d}",
            name,
            split,
            (ImageRef(f"{name}{n // per_image}", "", bytes),),
            "q",
            "a",
            ("a",),
            metadata=metadata,
        )
        for n in range(count)
    ]


def part(name: str, count: int, weight: float | None = None) -> tuple[DatasetSpec, list[Sample]]:
    return DatasetSpec(name, None, weight), questions(name, count)


def test_without_weights_everything_comes_once_in_order():
    parts = [part("a", 10), part("b", 7)]
    assert mix(parts, None, 1) == parts[0][1] + parts[1][1] == mix(parts, 17, 2)


def test_weights_make_questions_of_a_set_as_likely_as_said():
    parts = [part("a", 300, 2), part("b", 600, 1)]
    mixed = mix(parts, None, 0)
    counts = Counter(s.dataset for s in mixed)
    assert counts == {"a": 450, "b": 450}  # 900 * 2*300 / (2*300 + 600)
    assert len({s.id for s in mixed}) == len(mixed)
    again = [s.id for s in mixed if s.id.endswith("#2")]
    assert len(again) == 150 and all(name.startswith("a/") for name in again)
    assert {s.id for s in mixed if s.dataset == "a" and "#" not in s.id} == {s.id for s in parts[0][1]}


def test_many_passes_number_their_repetitions():
    mixed = mix([part("a", 10, 100), part("b", 1000, 1)], None, 0)
    counts = Counter(s.id.partition("#")[0] for s in mixed if s.dataset == "a")
    assert sum(counts.values()) == 505 and set(counts.values()) == {50, 51}
    assert {s.id.partition("#")[2] for s in mixed if s.id.startswith("a/00000")} >= {"", "2", "50"}


def test_max_samples_keeps_proportions_and_whole_images():
    mixed = mix([part("a", 900), part("b", 300)], 100, 5)
    assert Counter(s.dataset for s in mixed) == {"a": 75, "b": 25}
    sizes = Counter(Counter(s.image_key for s in mixed).values())
    assert sizes == {3: 33, 1: 1}  # 25 images of a; 8 of b and one question of a ninth


def test_the_seed_decides():
    parts = [part("a", 300, 2), part("b", 500)]
    assert mix(parts, 90, 3) == mix(parts, 90, 3) != mix(parts, 90, 4)


def test_a_draw_does_not_depend_on_hash_randomisation():
    code = (
        "from tests.unit.test_mixture import *; import hashlib;"
        "m = mix([part('a', 300, 2), part('b', 500)], 90, 3) + stratified_limit(questions('c', 200), 20, 1);"
        "import sys; sys.stdout.write(hashlib.sha256(' '.join(s.id for s in m).encode()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) == 64


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([None, 0.3, 1.0, 7.0])), min_size=1, max_size=4),
    limit=st.one_of(st.none(), st.integers(1, 60)),
)
def test_sizes_and_unique_ids(sizes, limit):
    parts = [part(f"d{n}", size, weight) for n, (size, weight) in enumerate(sizes)]
    total = sum(size for size, _ in sizes)
    mixed = mix(parts, limit, 0)
    assert len({s.id for s in mixed}) == len(mixed)
    if limit is not None and limit < total - len(sizes):
        assert len(mixed) == limit
    elif limit is None:
        assert abs(len(mixed) - total) <= len(sizes) / 2  # each share is rounded by itself


def test_stratified_limit_mirrors_the_whole_and_is_no_head_slice():
    samples = (
        questions("t", 500, split="human", kind="x")
        + questions("t", 300, split="augmented", kind="y")
        + questions("t", 200, split="augmented", kind="z")
    )
    drawn = stratified_limit(samples, 100, 0)
    assert Counter((s.split, s.metadata["question_type"]) for s in drawn) == {
        ("human", "x"): 50,
        ("augmented", "y"): 30,
        ("augmented", "z"): 20,
    }
    assert {s.id for s in stratified_limit(samples[::-1], 100, 0)} == {s.id for s in drawn}
    assert [s.id for s in drawn[:50]] != [s.id for s in samples[:50]]
    assert [s.id for s in drawn] == [s.id for s in samples if s in drawn]
    assert stratified_limit(samples, 100, 1) != drawn


@pytest.mark.parametrize("limit", [1, 7, 99, 100, 999, 1000, 5000])
def test_stratified_limit_is_exact(limit):
    samples = [s for n in range(40) for s in questions("t", 25, kind=f"k{n}")]
    assert len(stratified_limit(samples, limit, 0)) == min(limit, 1000)
    assert stratified_limit(samples, None, 0) == samples


def test_no_limit_below_one():
    with pytest.raises(DataError, match="below 1"):
        mix([part("a", 3)], 0, 0)
    with pytest.raises(DataError, match="below 1"):
        stratified_limit(questions("a", 3), -2, 0)


def test_loss_weights_are_read_and_multiplied() -> None:
    specs = parse_datasets("chartqa,textvqa")
    assert parse_loss_weights(None, specs) == {}
    weights = parse_loss_weights("textvqa=0.25, chartqa=2", specs)
    one = Sample("a", "textvqa", "", (), "q", "a", ("a",), weight=4.0)
    assert [sample.weight for sample in weighted([one], weights)] == [1.0]
    for wrong in ("textvqa", "textvqa=-1", "textvqa=0", "textvqa=nan", "docvqa=1", "chartqa=1,chartqa=2"):
        with pytest.raises(DataError, match="--loss_weights"):
            parse_loss_weights(wrong, specs)

import itertools
from pathlib import Path

import pytest

from vlm_sft.common.errors import DataError
from vlm_sft.data.sample import ImageRef, LeftOut, Sample
from vlm_sft.data.sources.files import files_by_split
from vlm_sft.data.sources.splits import (
    MissingSplitError,
    SplitPlan,
    apply_plan,
    image_groups,
    own_images,
    plan_split,
    shared_images,
)

BOTH = ("validation", "test")


def part_of(part, samples, left, fraction, held=("validation",)):
    return apply_plan(SplitPlan("train", part, held), samples, left, fraction)[:2]


def sample(number: int, *keys: str) -> Sample:
    images = tuple(ImageRef(key, key, bytes) for key in keys)
    return Sample(f"d/{number}", "d", "", images, "q", "a", ("a",))


@pytest.mark.parametrize(
    "available, split, source, part",
    [
        ("train validation test", "train", "train", "all"),
        ("train validation test", "test", "test", "all"),
        ("train test", "train", "train", "train"),
        ("train test", "validation", "train", "validation"),
        ("train", "train", "train", "train"),
        ("train", "validation", "train", "validation"),
        ("train", "test", "train", "test"),
        ("train validation", "test", "validation", "all"),
        ("validation", "validation", "validation", "all"),
    ],
)
def test_plan(available, split, source, part):
    plan = plan_split(available.split(), split, "d")
    assert (plan.source, plan.part) == (source, part)
    assert plan.held == (() if part == "all" else ("validation",) if "test" in available else ("validation", "test"))


def test_the_benchmark_never_serves_training():
    for split in ("train", "validation"):
        with pytest.raises(MissingSplitError, match=f"no {split} split .it has: test"):
            plan_split(["test"], split, "d")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        plan_split(["train"], "dev", "d")


def test_files_are_sorted_by_the_split_in_their_names(tmp_path):
    names = [
        "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
        "data/val-00000-of-00001.parquet",
        "test/part0.parquet",
        "more.parquet",
        ".cache/train.parquet",
        "data/notes.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = files_by_split(tmp_path, (".parquet",))
    relative = {split: [str(file.relative_to(tmp_path)) for file in files] for split, files in found.items()}
    assert relative == {"train": [names[1], names[0], names[4]], "validation": [names[2]], "test": [names[3]]}
    assert files_by_split(tmp_path / names[2], (".parquet",)) == {"validation": [tmp_path / names[2]]}
    with pytest.raises(DataError, match="holds no .jsonl"):
        files_by_split(tmp_path, (".jsonl",))


def test_hold_out_cuts_by_image_and_loses_nothing():
    samples = [sample(number, f"image{number // 3}") for number in range(600)]
    left = [LeftOut(f"d/bad{number}", "r", "") for number in range(1000)]
    kept, kept_left = part_of("train", samples, left, 0.1)
    held, held_left = part_of("validation", samples, left, 0.1)
    assert len(held) == 60 and len(kept) == 540  # 20 of 200 images, three questions each
    assert not {s.image_key for s in kept} & {s.image_key for s in held}
    assert {s.id for s in kept} | {s.id for s in held} == {s.id for s in samples}
    assert len(kept_left) + len(held_left) == 1000 and 60 < len(held_left) < 140
    shuffled, _ = part_of("validation", samples[::-1], left, 0.1)
    assert {s.id for s in shuffled} == {s.id for s in held}  # whatever the order of the file


def test_samples_that_share_an_image_stay_together():
    samples = [sample(0, "a"), sample(1, "a", "b"), sample(2, "b", "c"), sample(3, "x"), sample(4, "y"), sample(5, "c")]
    for fraction in (0.1, 0.3, 0.5, 0.7):
        kept, _ = part_of("train", samples, [], fraction)
        held, _ = part_of("validation", samples, [], fraction)
        of_kept = {image.key for s in kept for image in s.images}
        of_held = {image.key for s in held for image in s.images}
        assert kept and held and not of_kept & of_held


def test_one_image_alone_is_never_held_out():
    samples = [sample(0, "a"), sample(1, "a")]
    assert part_of("train", samples, [], 0.1)[0] == samples
    assert part_of("validation", samples, [], 0.1)[0] == part_of("test", samples, [], 0.1, BOTH)[0] == []


@pytest.mark.parametrize("images", [2, 3, 4, 7, 10, 24, 25, 200])
def test_validation_and_test_are_held_out_apart(images):
    samples = [sample(number, f"image{number % images}") for number in range(3 * images)]
    left = [LeftOut(f"d/bad{number}", "r", "") for number in range(1000)]
    parts = {part: part_of(part, samples, left, 0.1, BOTH) for part in ("train", "validation", "test")}
    seen = {part: {s.image_key for s in found} for part, (found, _) in parts.items()}
    assert all(seen.values())
    if images == 2:  # two are enough for one of them
        assert seen["validation"] == seen["test"] and not seen["train"] & seen["test"]
        return
    assert len(seen["validation"]) == len(seen["test"]) == max(1, round(0.1 * images))
    assert sum(len(keys) for keys in seen.values()) == images == len(set().union(*seen.values()))
    assert sum(len(gone) for _, gone in parts.values()) == 1000
    assert {s.id for s in part_of("validation", samples, left, 0.1)[0]} == {s.id for s in parts["validation"][0]}


def shared(rows, *references, first=True):
    """Rows of an image of their own, beside one of the references in turn."""
    keys = [(references[number % len(references)], f"own{number}") for number in range(rows)]
    return [sample(number, *(pair if first else pair[::-1])) for number, pair in enumerate(keys)]


@pytest.mark.parametrize(
    "samples, groups",
    [
        (shared(6, "ref"), 6),
        (shared(24, "ref"), 24),
        (shared(24, "ref", first=False), 24),
        (shared(24, "ref1", "ref2"), 24),
        (shared(30, "ref1", "ref2", "ref3"), 30),
        ([*shared(24, "ref"), sample(90, "alone"), sample(91, "ref")], 26),
        ([sample(n, "ref1", "ref2", f"own{n}") for n in range(12)], 12),
        ([sample(n, "ref", f"own{n // 3}") for n in range(12)], 4),  # three questions a pair
        ([sample(n, "ref", f"a{n}", f"b{n}") for n in range(8)], 8),
        ([sample(n, f"frame{n}", f"frame{n + 1}") for n in range(12)], 1),  # a chain is no reference
        ([sample(n, *pair) for n, pair in enumerate(itertools.combinations("abcde", 2))], 1),  # nor is a tournament
        ([sample(n, "one") for n in range(30)] + [sample(90, "two")], 2),
    ],
)
def test_images_beside_many_others_tie_nothing(samples, groups):
    assert len(set(image_groups(samples, 0.1))) == groups
    if groups >= 3:
        own = [
            {key for s in part_of(part, samples, [], 0.1, BOTH)[0] for key in own_images(s, shared_images(samples))}
            for part in ("train", "validation", "test")
        ]
        assert all(own) and not (own[0] & own[1] or own[0] & own[2] or own[1] & own[2])


def test_path_is_searched_in_a_stable_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    assert [Path(f).name for f in files_by_split(tmp_path, (".jsonl",))["train"]] == ["a.jsonl", "b.jsonl"]

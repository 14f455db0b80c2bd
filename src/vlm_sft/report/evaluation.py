"""Reads the folder of `vlm-sft eval`: one model, a folder for each benchmark."""

from __future__ import annotations

from pathlib import Path

from vlm_sft.common import artifacts
from vlm_sft.report.fields import Fields
from vlm_sft.report.predictions import Prediction, read_pairs
from vlm_sft.report.records import Benchmark, Score, SplitScore


def benchmark_folders(folder: Path) -> list[Path]:
    """The folders of its benchmarks, by name; none in the folder of a training."""
    return sorted(path.parent for path in folder.glob(f"*/{artifacts.PREDICTIONS}"))


def one_model(name: str, fields: Fields, tuned: bool) -> Benchmark:
    """The results of one model on one benchmark.

    Args:
        name: of the benchmark.
        fields: of its results.json.
        tuned: the model has an adapter; else it is a base model.
    """
    score = Score(
        fields.number("accuracy"), fields.interval("interval"), fields.number("seconds"), fields.whole("cut") or 0
    )
    splits = [
        SplitScore(split, one.whole("n"), *((None, value) if tuned else (value, None)))
        for split, one in fields.inside("splits").objects()
        for value in [one.number("accuracy")]
    ]
    return Benchmark(
        name=name,
        n=fields.whole("n"),
        metric=fields.text("metric"),
        synthetic=bool(fields.flag("synthetic")),
        base=None if tuned else score,
        tuned=score if tuned else None,
        difference=None,
        difference_interval=None,
        p_value=None,
        verdict="",
        splits=tuple(splits),
        max_new_tokens=fields.whole("max_new_tokens"),
        answer_tokens=fields.whole("answer_tokens"),
    )


def answers_of(folder: Path, tuned: bool, problems: list[str]) -> list[Prediction]:
    """The answers of that model.

    Args:
        folder: of a benchmark.
        tuned: see `one_model`.
        problems: receives a message for every file that cannot be read.
    """
    absent = folder.parent / artifacts.EVALUATION_FOLDER / folder.name
    pair = (absent, folder) if tuned else (folder, absent)
    return list(read_pairs(*pair, folder.parent, problems))

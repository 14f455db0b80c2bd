"""Published benchmarks, read from local copies in the schema of the Hub, down to their score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import png
from vlm_sft.data.sample import Turn
from vlm_sft.data.sources.published import LETTER, SOURCES
from vlm_sft.data.sources.registry import LOADERS, load_split
from vlm_sft.data.sources.spec import KNOWN, PUBLISHED, TABLE_SETS, parse_datasets
from vlm_sft.evaluate.metrics import BENCHMARKS
from vlm_sft.evaluate.tasks import load_tasks
from vlm_sft.recipe.metric_names import EVALUATION_METRICS

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(folder: Path, split: str, rows: list[dict[str, Any]], binary: bool = False) -> Path:
    """A parquet file in the layout of the Hub; ChartQAPro holds its images as bytes alone."""
    folder.mkdir(exist_ok=True)
    images = [png((number * 40, 9, 9)) for number in range(len(rows))]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    held = (
        pa.array(images, pa.binary()) if binary else pa.array([{"bytes": one, "path": None} for one in images], IMAGE)
    )
    pq.write_table(pa.table({"image": held, **columns}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_names_agree_everywhere() -> None:
    assert set(PUBLISHED) == set(SOURCES) <= set(LOADERS) and set(PUBLISHED) <= set(KNOWN) & set(TABLE_SETS)
    assert set(PUBLISHED) <= set(BENCHMARKS)
    assert [benchmark.metric_name for benchmark in BENCHMARKS.values()] == list(EVALUATION_METRICS[1:])


def test_documents(tmp_path: Path) -> None:
    row = {"question": "Who? ", "answers": ["ITC", "itc limited", "ITC"], "question_types": ["form", "layout"]}
    folder = table(tmp_path / "doc", "validation", [row, row | {"answers": []}])
    loaded = load_split(parse_datasets(f"docvqa@{folder}")[0], "test")
    (sample,) = loaded.samples
    assert (sample.question, sample.target, sample.answers) == ("Who?", "ITC", ("ITC", "itc limited", "ITC"))
    assert sample.metadata["question_type"] == "form / layout" and sample.id == "docvqa/validation/000000"
    assert [one.reason for one in loaded.left_out] == ["empty answer"]
    assert "validation split is used instead" in loaded.description


def test_chartqapro(tmp_path: Path) -> None:
    row = {
        "Question": ["What was first?", "And then?"],
        "Answer": ["7", "1994"],
        "Question Type": "Conversational",
        "Year": ["NO", "YES"],
        "Paragraph": "About a chart.",
    }
    single = row | {"Question": ["Sum?"], "Answer": ["[A, B]"], "Year": ["NO"], "Question Type": "Factoid"}
    folder = table(tmp_path / "pro", "test", [row, single | {"Paragraph": ""}, row | {"Answer": ["7"]}], binary=True)
    (task,), left = load_tasks(parse_datasets(f"chartqapro@{folder}"), None)
    first, second = task.samples
    assert (
        first.question == "About a chart.\nAnd then?" and first.answers == ("1994",) and first.split == "Conversational"
    )
    assert first.history == (Turn("user", "What was first?"), Turn("assistant", "7"))
    assert task.benchmark.score("1995", first.answers, first.metadata) == 0.0
    assert second.question == "Sum?" and task.benchmark.score("['A','B']", second.answers, second.metadata) == 1.0
    assert [one.reason for one in left] == ["no answer to each question"]


def test_ai2d_asks_for_the_letter(tmp_path: Path) -> None:
    row = {"question": "What eats grass?", "options": ["a fox", "a hare"], "answer": "1"}
    folder = table(tmp_path / "ai2d", "test", [row, row | {"answer": "2"}])
    (task,), left = load_tasks(parse_datasets(f"ai2d@{folder}"), None)
    (sample,) = task.samples
    assert sample.question == f"What eats grass?\nA. a fox\nB. a hare\n{LETTER}" and sample.target == "B"
    scores = [task.benchmark.score(text, sample.answers, sample.metadata) for text in ("B", "a hare", "a fox", "A")]
    assert scores == [1, 1, 0, 0] and [one.reason for one in left] == ["no such option"]


def test_realworldqa_and_ocrbench(tmp_path: Path) -> None:
    folder = table(tmp_path / "real", "test", [{"question": "Left?\nA. Yes\nB. No", "answer": "B"}])
    (task,), _ = load_tasks(parse_datasets(f"realworldqa@{folder}"), None)
    assert task.benchmark.score("B.", task.samples[0].answers, task.samples[0].metadata) == 1.0
    row = {"dataset": "HME100k", "question": "Formula?", "question_type": "Formula", "answer": ["x^2"]}
    folder = table(tmp_path / "ocr", "test", [row])
    (task,), _ = load_tasks(parse_datasets(f"ocrbench@{folder}"), None)
    (sample,) = task.samples
    assert task.benchmark.score("it is x ^ 2", sample.answers, sample.metadata) == 1.0
    assert sample.metadata["question_type"] == "Formula"

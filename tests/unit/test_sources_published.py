"""Published benchmarks, read from local copies in the schema of the Hub, down to their score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import png
from vlm_sft.common.errors import DataError, EvaluationError
from vlm_sft.data.sample import Place, Turn
from vlm_sft.data.sources.mmmu import PHRASE
from vlm_sft.data.sources.published import LETTER, SOURCES
from vlm_sft.data.sources.registry import LOADERS, load_split
from vlm_sft.data.sources.spec import KNOWN, PUBLISHED, TABLE_SETS, parse_datasets
from vlm_sft.evaluate.metrics import BENCHMARKS
from vlm_sft.evaluate.own_metrics import chosen_rules
from vlm_sft.evaluate.tasks import load_tasks

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded_table(path: Path, columns: dict[str, Any]) -> None:
    """A parquet file in the layout of the Hub; columns of bytes are images."""
    pictures = {name: values for name, values in columns.items() if any(isinstance(one, bytes) for one in values)}
    held = {
        name: pa.array([one and {"bytes": one, "path": None} for one in values], IMAGE)
        for name, values in pictures.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | held), path)


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


def test_documents(tmp_path: Path) -> None:
    row = {"question": "Who? ", "answers": ["ITC", "itc limited", " ITC"], "question_types": ["form", "layout"]}
    folder = table(tmp_path / "doc", "validation", [row, row | {"answers": []}])
    loaded = load_split(parse_datasets(f"docvqa@{folder}")[0], "test")
    (sample,) = loaded.samples
    assert (sample.question, sample.target, sample.answers) == ("Who?", "ITC", ("ITC", "itc limited", " ITC"))
    assert BENCHMARKS["docvqa"].score("ITX", sample.answers[2:], {}) == 1 - 1 / 4  # ANLS counts the space
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
    rows = [
        {"question": "Way?\n\nA. Left\nB. Straight on\nAnswer with the letter.", "answer": "B"},
        {"question": "How many? A. Smith counts.\nA. 1\nC. 3", "answer": "A"},
        {"question": "Green?", "answer": "Yes"},
    ]
    folder = table(tmp_path / "real", "test", rows)
    (task,), _ = load_tasks(parse_datasets(f"realworldqa@{folder}"), None)
    choice, gap, word = task.samples
    assert choice.metadata["options"] == ["Left", "Straight on"] and "options" not in gap.metadata | word.metadata
    scores = [
        task.benchmark.score(text, choice.answers, choice.metadata) for text in ("B.", "straight on", "left", "A")
    ]
    assert scores == [1, 1, 0, 0] and task.benchmark.score("yes.", word.answers, word.metadata) == 1.0
    row = {"dataset": "HME100k", "question": "Formula?", "question_type": "Formula", "answer": ["x^2"]}
    folder = table(tmp_path / "ocr", "test", [row])
    (task,), _ = load_tasks(parse_datasets(f"ocrbench@{folder}"), None)
    (sample,) = task.samples
    assert task.benchmark.score("it is x ^ 2", sample.answers, sample.metadata) == 1.0
    assert sample.metadata["question_type"] == "Formula"


def test_ocrvqa_asks_every_question_of_a_cover(tmp_path: Path) -> None:
    row = {"questions": ["Who wrote it?", " ", "Genre?"], "answers": ["Ann Lee", "x", "Art"]}
    folder = table(tmp_path / "ocrvqa", "test", [row, row | {"answers": ["one"]}])
    (task,), left = load_tasks(parse_datasets(f"ocrvqa@{folder}"), None)
    first, second = task.samples
    assert (first.id, first.question, first.answers) == ("ocrvqa/test/000000/0", "Who wrote it?", ("Ann Lee",))
    assert second.id == "ocrvqa/test/000000/2" and first.image_key == second.image_key
    assert task.benchmark.score("ann lee", first.answers, {}) == 1.0
    assert [(one.id, one.reason) for one in left] == [
        ("ocrvqa/test/000000/1", "empty question"),
        ("ocrvqa/test/000001", "no answer to each question"),
    ]


def mmmu_row(number: int, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys((f"image_{one}" for one in range(1, 8)), None)
    pictures = {"image_1": png((number, 1, 1)), "image_2": png((number, 2, 2))}
    row = {"id": f"validation_Art_Theory_{number}", "question": "See <image 1>. Which?", "options": "[]", "answer": "B"}
    return empty | pictures | row | {"question_type": "multiple-choice"} | more


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        mmmu_row(1, options="['<image 2>', \"it's blue, unlike <image 1>\", 'red']", answer="B"),
        mmmu_row(2, question="How much in <image 2>?", answer="['3.5', '7/2']", question_type="open"),
        mmmu_row(3, question="<image 5>?", options="['a', 'b']"),
        mmmu_row(4, options="['a', 'b']", answer="C"),
    ]
    for subject, split, some in (("Art_Theory", "validation", rows), ("Art_Theory", "dev", rows[:1])):
        columns = {name: [row[name] for row in some] for name in rows[0]}
        columns |= {f"image_{one}": pa.nulls(len(some), IMAGE) for one in range(3, 8)}
        encoded_table(tmp_path / "mmmu" / subject / f"{split}-00000-of-00001.parquet", columns)
    (task,), left = load_tasks(parse_datasets(f"mmmu@{tmp_path / 'mmmu'}"), None)
    choice, opened = task.samples
    assert choice.question == f"See . Which?\nA. \nB. it's blue, unlike <image 1>\nC. red\n{LETTER}"
    assert choice.places == (Place(0, 4), Place(0, 16)) and choice.images[0].load() == png((1, 1, 1))
    assert (choice.target, choice.split, len(choice.images)) == ("B", "Art and Design", 2)
    assert choice.metadata["options"][1] == "it's blue, unlike <image 1>"
    replies = ("B", "I would choose (B)", "the answer is clearly it's blue, unlike <image 1>", "no idea", "A")
    assert [task.benchmark.score(text, choice.answers, choice.metadata) for text in replies] == [1, 1, 1, 0, 0]
    assert (
        opened.question == f"How much in ?\n{PHRASE}"
        and opened.answers == ("3.5", "7/2")
        and len(opened.images) == 1
        and opened.metadata["question_type"] == "open"
    )
    replies = ("It is 3.50.", "so x = 7/2", "4")
    assert [task.benchmark.score(text, opened.answers, opened.metadata) for text in replies] == [1, 1, 0]
    assert [(one.id, one.reason) for one in left] == [
        ("mmmu/validation/000002", "image missing"),
        ("mmmu/validation/000003", "no such option"),
    ]


def test_mmmu_is_not_streamed() -> None:
    with pytest.raises(DataError, match="mmmu@stream: it has 30 parts"):
        load_tasks(parse_datasets("mmmu@stream"), 5)


def test_charxiv_says_what_form_its_answer_has(tmp_path: Path) -> None:
    rows = [
        {"reasoning_q": "Which curve?", "reasoning_a": "P-101", "reasoning_a_type": 1},
        {"reasoning_q": "How much more?", "reasoning_a": "0.25", "reasoning_a_type": 4},
        {"reasoning_q": "How many?", "reasoning_a": "3", "reasoning_a_type": 4},
        {"reasoning_q": "How many?", "reasoning_a": "3", "reasoning_a_type": 7},
    ]
    loaded = load_split(parse_datasets(f"charxiv@{table(tmp_path / 'charxiv', 'val', rows)}")[0], "test")
    assert [sample.question.partition("\n")[2] for sample in loaded.samples][1:] == [
        "Answer with a number with 2 decimal places.",
        "Answer with a whole number.",
    ]
    assert [sample.metadata["question_type"] for sample in loaded.samples] == [
        "text in chart",
        *2 * ["number in general"],
    ]
    assert [one.reason for one in loaded.left_out] == ["unknown kind of answer"]
    with pytest.raises(EvaluationError, match="charxiv: answers are graded by a judge"):
        chosen_rules(["charxiv", "chartqa"], None)


def test_chartmuseum_finds_the_pictures_beside_its_tables(tmp_path: Path) -> None:
    (tmp_path / "museum" / "images").mkdir(parents=True)
    (tmp_path / "museum" / "images" / "a.png").write_bytes(png("red"))
    row = {"image": ["images/a.png"], "question": ["Tallest?"], "answer": ["B"], "reasoning_type": ["visual"]}
    for name in ("dev", "test"):
        path = tmp_path / "museum" / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(row), path)
    for split, official in (("test", "test"), ("validation", "validation")):
        loaded = load_split(parse_datasets(f"chartmuseum@{tmp_path / 'museum'}")[0], split)
        (sample,) = loaded.samples
        assert sample.id == f"chartmuseum/{official}/000000" and sample.images[0].load() == png("red")
        assert sample.metadata["question_type"] == "visual" and sample.answers == ("B",)

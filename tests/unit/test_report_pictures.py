"""Every prediction that a report shows has its picture, or the report says truly why not."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.pictures import png
from tests.report_runs import Page, record
from tests.wording import line_with
from vlm_sft.common import artifacts
from vlm_sft.data.boxes import Convention
from vlm_sft.data.sample import ImageRef
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.evaluate import pictures as kept_pictures
from vlm_sft.evaluate.backends import Reply
from vlm_sft.evaluate.evaluator import prediction_row
from vlm_sft.evaluate.tasks import Task, load_tasks
from vlm_sft.report import pictures as shown_pictures
from vlm_sft.report.html import write_report

QUESTIONS = 300  # more than the 240 of which earlier versions kept pictures


@pytest.fixture(scope="module")
def task() -> Task:
    (found,), _ = load_tasks([DatasetSpec("demo_charts")], QUESTIONS, "test")
    return found


def evaluated(folder: Path, task: Task) -> Path:
    """A run as an evaluation leaves it, with answers that are all "1"."""
    artifacts.write_json(folder / artifacts.RUN, record())
    evaluation = folder / artifacts.EVALUATION_FOLDER
    for side in ("base", "tuned"):
        rows = [
            prediction_row(task.benchmark, Reply(sample, "1", False), "", Convention(str, None))
            for sample in task.samples
        ]
        artifacts.write_jsonl(evaluation / side / task.name / artifacts.PREDICTIONS, rows)
    kept_pictures.save_pictures([task], evaluation)
    return folder


def shown(folder: Path) -> tuple[Page, Counter[str]]:
    """The page of a run, and how many questions have a picture ("") or a reason."""
    page = Page(write_report([folder], folder / artifacts.REPORT).read_text(encoding="utf-8"))
    held = page.held
    told = (question[2] for question in held["questions"])
    return page, Counter("" if number >= 0 else held["unpictured"][-1 - number] for number in told)


def test_every_question_has_its_picture_and_every_picture_is_there_once(task: Task, tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", task)
    page, told = shown(folder)
    images = {sample.images[0].key: sample.images[0] for sample in task.samples}
    assert told == {"": QUESTIONS} and len(page.held["pictures"]) == len(images) < QUESTIONS
    assert len(list((folder / "evaluation" / "images").iterdir())) == len(images)
    by_id = {question[1]: question[2] for question in page.held["questions"]}
    for sample in task.samples[::50]:
        data = base64.b64decode(page.held["pictures"][by_id[sample.id]].partition("base64,")[2])
        small = Image.open(io.BytesIO(data)).convert("L").resize((16, 16))
        whole = Image.open(io.BytesIO(sample.images[0].load())).convert("L").resize((16, 16))
        apart = [abs(one - other) for one, other in zip(small.tobytes(), whole.tobytes(), strict=True)]
        assert sum(apart) / len(apart) < 3, "it is the picture of this question"
    assert (folder / artifacts.REPORT).stat().st_size < 16_000_000
    assert f"{len(images)} pictures are embedded." in page.text
    assert artifacts.read_json(folder / "evaluation" / artifacts.PICTURES)["kept"] == len(images)
    before = (folder / artifacts.REPORT).read_bytes()
    kept_pictures.save_pictures([task], folder / "evaluation")
    assert write_report([folder], folder / artifacts.REPORT).read_bytes() == before


def test_several_images_of_a_question_are_shown_beside_each_other(task: Task, tmp_path: Path) -> None:
    """A reference image that stands first in every question must not be all that is shown."""
    colors = ["red", "green", "blue", "black", "yellow"]
    parts = [ImageRef.from_bytes(png(color, (60 + 200 * number, 90)), color) for number, color in enumerate(colors)]
    asked = [replace(task.samples[0], id=str(count), images=tuple(parts[:count])) for count in (1, 2, 5)]
    asked.append(replace(asked[1], id="turned", images=asked[1].images[::-1]))
    folder = evaluated(tmp_path / "run", replace(task, samples=asked))
    page, told = shown(folder)
    assert told == {"": 4} and len(page.held["pictures"]) == 4
    for row in artifacts.read_jsonl(folder / "evaluation" / "tuned" / task.name / artifacts.PREDICTIONS):
        picture = Image.open(folder / "evaluation" / row["image"]).convert("RGB")
        assert max(picture.size) <= 480
        pixels = np.asarray(picture, dtype=int)
        seen = {name for name in colors if (np.abs(pixels - ImageColor.getrgb(name)).sum(axis=2) < 40).sum() > 100}
        count = 2 if row["id"] == "turned" else int(row["id"])
        assert seen == set(colors[:count])


def test_what_was_not_kept_is_told(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_pictures, "KEPT_BYTES", 100_000)
    folder = evaluated(tmp_path / "run", task)
    total = sum(path.stat().st_size for path in (folder / "evaluation" / "images").iterdir())
    assert 90_000 < total < 150_000
    page, told = shown(folder)
    reason = "picture not stored: an evaluation stores 100 kB of pictures a benchmark"
    assert set(told) == {"", reason} and told[""] >= 5
    assert f"{told[reason]} questions: picture not stored" in page.text


def test_what_a_page_has_no_room_for_is_told(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evaluated(tmp_path / "run", task)
    monkeypatch.setattr(shown_pictures.Album.__init__, "__defaults__", (200_000,))
    page, told = shown(folder)
    reason = "picture not embedded: this page holds 200 kB of pictures; see the run's evaluation/images"
    assert set(told) == {"", reason} and sum(map(len, page.held["pictures"])) <= 200_000
    assert all(
        (folder / "evaluation" / row["image"]).is_file()
        for row in artifacts.read_jsonl(folder / "evaluation" / "base" / task.name / artifacts.PREDICTIONS)
    )


def test_an_image_that_cannot_be_read_any_more_ends_nothing(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> bytes:
        raise OSError(5, "Input/output error")

    broken = replace(task.samples[0], id="broken", images=(ImageRef("0" * 64, "disk/3.png", gone),))
    folder = evaluated(tmp_path / "run", replace(task, samples=[broken, *task.samples[1:]]))
    assert line_with(capsys.readouterr().err, "warning: ", "1 picture", "disk/3.png")
    told = shown(folder)[1]
    assert told["picture not stored: disk/3.png: the image cannot be read: Input/output error"] == 1
    assert told[""] == QUESTIONS - 1

"""Boxes that a record declares: as each family writes them, in pixels again when scored, and refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests import tiny_models
from tests.pictures import png
from tests.questions import PROMPT, picture
from vlm_sft.cli.main import main
from vlm_sft.common.errors import ModelError
from vlm_sft.data.boxes import Convention, widest
from vlm_sft.data.dataset import PreparedData, usable_samples
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import check_image
from vlm_sft.data.sample import Place, Sample, Turn
from vlm_sft.data.sources.registry import load_split, parse_datasets
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.load import find_base

ROOM = (100, 60)  # pixels of the picture
SAID = '{"bbox_2d": [25, 15.5, 100, 60], "label": "2 [red, 3, 4, 5] bars"}, [0,0, 7 , 1]'


def boxed(target: str = SAID) -> Sample:
    image = check_image(picture(1, ROOM))
    history = (Turn("user", "What is at [10, 10, 20, 20]?"), Turn("assistant", "not [1, 2, 3]"))
    question = "Where are [50, 30, 60, 40] and ?"
    return Sample("room", "tiny", "", (image,), question, target, (target,), history, boxes=ROOM)


def convention(family: str) -> Convention:
    return Convention(lambda: family, tiny_models.build(family)[1])


def test_thousandths_of_width_and_height() -> None:
    found = convention("qwen3_vl").written(boxed())
    assert found.target == '{"bbox_2d": [250, 258, 1000, 1000], "label": "2 [red, 3, 4, 5] bars"}, [0,0, 70 , 17]'
    assert found.question == "Where are [500, 500, 600, 667] and ?" and found.boxes is None
    assert [turn.text for turn in found.history] == ["What is at [100, 167, 200, 333]?", "not [1, 2, 3]"]
    assert found.answers == (found.target,)


@pytest.mark.parametrize("size", [ROOM, (200, 300)])
def test_pixels_of_the_image_as_the_processor_resized_it(size: tuple[int, int]) -> None:
    """Also where the image was replaced by one of another size, since it was too long for the model."""
    processor = tiny_models.build("qwen2_5_vl")[1]
    encoder = Encoder(processor, PROMPT, family=lambda: "qwen2_5_vl")
    sample = replace(boxed(), images=(check_image(picture(1, size)),))
    _, rows, columns = encoder.process_images(sample)["image_grid_thw"][0].tolist()
    patch = processor.image_processor.patch_size
    width, height = columns * patch, rows * patch
    assert (width, height) != size
    corner = json.dumps([round(25 * width / 100), round(15.5 * height / 60), width - 1, height - 1])
    ((trained, group, _),) = PreparedData([sample], encoder, "encoding").samples()
    assert trained == sample  # in pixels of the record; its tokens are in those of the model
    answer = encoder.tokenizer.decode(group.questions[0].answer_ids, skip_special_tokens=True).strip()
    assert corner in answer and encoder.boxes.written(sample).target == answer
    assert encoder.boxes.as_said(sample, SAID) == encoder.boxes.in_pixels(sample, answer)
    asked = json.dumps([round(50 * width / 100), round(30 * height / 60)])[:-1]
    assert asked in encoder.prompt_text(sample) and "[50, 30," not in encoder.prompt_text(sample)


def test_answers_are_in_pixels_again() -> None:
    boxes, sample = convention("qwen2_vl"), boxed("[25, 15, 100, 60]")
    assert boxes.in_pixels(sample, boxes.written(sample).target) == "[25, 15, 100, 60]"
    assert boxes.in_pixels(sample, "at [1500, 0, 333.4, 999], 7") == "at [150, 0, 33, 60], 7"  # also out of the picture
    wide = replace(sample, boxes=(3000, 3000))
    assert boxes.as_said(wide, "[1, 2, 4, 2999]") == "[0, 3, 3, 3000]" == boxes.in_pixels(wide, "[0, 1, 1, 1000]")
    assert widest("[2, 2, 3, 4] of 5") == "[9999, 9999, 9999, 9999] of 5"


def test_an_image_between_words_keeps_its_place() -> None:
    sample = boxed()
    text = sample.question.index("?")
    moved = convention("qwen3_vl").written(replace(sample, places=(Place(2, text),)))
    assert moved.places == (Place(2, moved.question.index("?")),) and moved.places[0].at == text + 3 + 1


def test_a_family_without_a_known_convention_is_refused_by_name() -> None:
    encoder = Encoder(tiny_models.build("llava")[1], PROMPT, family=lambda: "llava")
    with pytest.raises(ModelError, match=r"room declares .boxes., .*'llava' write boxes is not known.*qwen2_5_vl"):
        usable_samples(encoder, [boxed()])


def record(number: int, **more: Any) -> dict[str, Any]:
    box = [3 * number, 2 * number, 40 + number, 50]
    return {"id": f"r{number}", "image": "a.png", "question": f"Box {number}?", "answer": str(box)} | more


@pytest.fixture()
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red", (90, 60)))
    (folder / "b.png").write_bytes(png("blue", (75, 64)))
    rows = [record(number, boxes="absolute") for number in range(1, 5)] + [record(5, boxes=[[1, 2, 3, 4]]), record(6)]
    for split in ("train", "test"):
        lines = [json.dumps(row | ({"image": "b.png"} if split == "test" else {})) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def loaded(path: Path) -> list[Sample]:
    return load_split(parse_datasets(str(path))[0], "train").samples


def test_what_a_record_may_declare(own: Path, tmp_path: Path) -> None:
    assert [sample.boxes for sample in loaded(own)] == [(90, 60)] * 4 + [None, None]
    two = {"role": "user", "content": "Is <image> [1, 2, 3, 4] of <image>?"}, {"role": "assistant", "content": "no"}
    wrong = [
        record(1, boxes="relative"),
        record(2, boxes="absolute", answer="[0, 0, 40, 500]"),
        {"messages": two, "images": ["a.png", "b.png"], "boxes": "absolute"},
        record(3, boxes="absolute"),
    ]
    path = own / "wrong.jsonl"
    path.write_text("\n".join(map(json.dumps, wrong)))
    left = load_split(parse_datasets(str(path))[0], "train").left_out
    assert [item.reason for item in left] == [
        "boxes are not absolute",
        "boxes without one image",
        "box outside of its image",
    ]
    assert "[0, 0, 40, 500]" in left[2].detail and "90 x 60 pixels" in left[2].detail


@pytest.mark.parametrize("layout", ["trl", "llamafactory", "msswift", "jsonl"])
def test_a_round_trip_keeps_the_declaration(layout: str, own: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["data", "export", str(own), "--format", layout, "--output", str(out)]) == 0
    assert main(["data", "import", str(out), "--format", layout, "--output", str(back)]) == 0
    kept = [(one.question, one.target, one.boxes) for one in loaded(back)]
    assert kept == [(one.question, one.target, one.boxes) for one in loaded(own)]


def test_a_benchmark_of_boxes_is_scored_in_pixels(own: Path, tmp_path: Path) -> None:
    """pocket is of the family qwen2_5_vl: it sees pixels of the resized image, the tables hold those of the file."""
    folder = tmp_path / "eval"
    flags = ["--output_dir", str(folder), "--prepared_cache", "off"]
    assert main(["eval", "--base_model", "pocket", "--benchmark", str(own), *flags]) == 0
    rows = [json.loads(line) for line in (folder / own.name / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for number, row in enumerate(rows, start=1):
        (answer,) = row["answers"]
        true = record(number)["answer"]
        assert np.abs(np.subtract(json.loads(answer), json.loads(true))).max() <= (1 if number < 5 else 0), row


def test_boxes_through_a_whole_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """90 x 60 pixels are 96 x 64 for the model: it learns those, says those, and is scored in pixels of the file."""
    own, run = tmp_path / "own", tmp_path / "run"
    own.mkdir()
    (own / "a.png").write_bytes(png("red", (90, 60)))
    row = {"image": "a.png", "question": "Box?", "answer": "[30, 20, 60, 50]", "boxes": "absolute"}
    for split in ("train", "test"):
        (own / f"{split}.jsonl").write_text(json.dumps({"id": split, **row}) + "\n")
    steps = ["--max_steps", "20", "--global_batch_size", "1", "--learning_rate", "0.02", "--lora_r", "8"]
    quiet = ["--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--eval_benchmarks", "none"]
    cache = ["--cache_dir", str(tmp_path / "cache")]
    place = ["--dataset", str(own), "--output_dir", str(run)]
    assert main(["train", "--base_model", "pocket", *place, *steps, *quiet, *cache]) == 0
    (shard,) = (tmp_path / "cache" / "tokens").rglob("*.safetensors")
    tensors = load_file(shard)
    supervised = tensors["0.tokens"][int(tensors["0.lengths"][0]) :]
    learned = encoder_of(find_base("pocket")).tokenizer.decode(supervised, skip_special_tokens=True).strip()
    assert learned == "[32, 21, 64, 53]"
    scores = ["--benchmark", str(own), "--output_dir", str(tmp_path / "eval"), *cache]
    assert main(["eval", "--adapter", str(run), *scores]) == 0
    (answered,) = map(json.loads, (tmp_path / "eval" / "own" / "predictions.jsonl").read_text().splitlines())
    assert answered["prediction"] == row["answer"] == answered["answers"][0] and answered["score"] == 1.0
    capsys.readouterr()
    assert main(["ask", str(own / "a.png"), "Box?", "--adapter", str(run)]) == 0
    assert f"tuned: {learned}\n" in capsys.readouterr().out

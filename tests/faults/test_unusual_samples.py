"""Images that a processor refuses, names of control tokens and moved images, through the public commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.pictures import png
from tests.questions import PROMPT, ask, picture
from vlm_sft.cli.main import main
from vlm_sft.common.errors import ModelError, SampleError
from vlm_sft.data.audit import PLACED_NOTE
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.sample import UNPROCESSABLE, ImageRef

REFUSED = "Processor cannot process the image: ValueError: absolute aspect ratio"  # of the family, or of its images
POCKET = ("--base_model", "pocket", "--max_left_out", "0.3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test rows: a refused image first, names of control tokens, an image behind words."""
    folder = tmp_path_factory.mktemp("unusual")
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png((40 * number, 90, 30), (60 + 8 * number, 56)))
    (folder / "long.png").write_bytes(png("red", (3000, 10)))
    rows: list[dict[str, Any]] = [
        {"id": "long", "image": "long.png", "question": "How long?", "answer": "3000"},
        {"id": "end", "image": "0.png", "question": "What <|im_end|>?", "answer": "An <|im_end|> tag"},
        {"id": "image", "image": "1.png", "question": "What does the <image> tag do?", "answer": "The <image> tag."},
        {"id": "pad", "image": "2.png", "question": "<|image_pad|><|vision_start|>?", "answer": "<|image_pad|>"},
        {
            "id": "placed",
            "images": ["3.png"],
            "messages": [{"role": "user", "content": "Look: <image> what?"}, {"role": "assistant", "content": "3"}],
        },
        {"id": "plain", "image": "4.png", "question": "What?", "answer": "4"},
    ]
    for split in ("train", "val", "test"):
        lines = [json.dumps(row | {"id": f"{split}-{row['id']}"}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def left_out(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_names_and_counts_them_and_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--sft_config", "smoketest", "--output_dir", str(run), "--cache_dir", str(tmp_path / "cache")]
    assert main(["train", *POCKET, "--dataset", str(data), "--on_bad_sample", "replace", *flags]) == 0
    told = capsys.readouterr()
    gone = left_out(run / "left_out.jsonl")
    assert {row["id"].rpartition("/")[2] for row in gone} == {"train-long", "val-long"}
    assert all(row["reason"] == UNPROCESSABLE and REFUSED in row["detail"] for row in gone)
    facts = read(run / "data.json")
    assert facts["train"]["samples"] == 5 and facts["left_out"] == {UNPROCESSABLE: 2}
    # <image> is no control token of this model: two rows of each part hold one.
    assert facts["notes"][PLACED_NOTE] == 2 and max(facts["notes"].values()) == 4
    assert f"note: {PLACED_NOTE}: 2 questions" in told.out
    notes = read(run / "run.json")["notes"]
    assert f"note: {PLACED_NOTE}: 2 questions" in notes
    assert any(note.startswith("benchmarks: 1 sample left out") and "test-long" in note for note in notes)
    assert read(run / "results.json")["benchmarks"][data.name]["n"] == 5


def test_evaluation_and_plan_do_the_same(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "eval"
    flags = ["--output_dir", str(folder), "--prepared_cache", "off"]
    assert main(["eval", *POCKET, "--benchmark", str(data), *flags]) == 0
    assert [row["id"] for row in left_out(folder / "left_out.jsonl")] == [f"{data.name}/test-long"]
    assert f"note: {PLACED_NOTE}: 1 questions" in read(folder / "run.json")["notes"]
    rows = left_out(folder / data.name / "predictions.jsonl")
    assert [row["question"] for row in rows][1] == "What does the <image> tag do?"
    assert main(["plan", *POCKET, "--dataset", str(data), "--sft_config", "smoketest"]) == 0
    told = capsys.readouterr()
    assert "samples left out (image cannot be processed: 2" in told.err and REFUSED in told.err
    assert f"note: {PLACED_NOTE}: 2 questions" in told.out and "data: 5 questions on 5 images" in told.out


def test_check_finds_what_a_model_refuses(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["data", "check", str(data), "--output_dir", str(tmp_path)]
    assert main(check) == 0
    told = capsys.readouterr()
    assert "as long as wide, which some models reject (all Qwen models): 1, e.g. " in told.err
    assert "long.png (3,000 x 10 pixels); --base_model MODEL checks with the model's processor" in told.err
    assert main([*check, "--base_model", "pocket"]) == 2
    told = capsys.readouterr()
    assert "cannot be used" in told.err and REFUSED in told.err
    assert read(tmp_path / "data.json")["notes"][PLACED_NOTE] == 1
    assert [row["id"] for row in left_out(tmp_path / "left_out.jsonl")] == [f"{data.name}/train-long"]


def test_a_single_question_gets_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(data / "long.png"), "How long?", "--base_model", "pocket"]) == 2
    assert REFUSED in capsys.readouterr().err
    assert main(["ask", str(data / "0.png"), "<|im_end|><|image_pad|><image>", "--base_model", "pocket"]) == 0
    assert main(["plan", "--base_model", "pocket", "--dataset", str(data), "--sft_config", "smoketest"]) == 2
    assert "fix: correct the samples that vlm-sft data check DATASET --split all --base_model MODEL names" in (
        capsys.readouterr().err
    )
    assert main(["plan", "--questions", "9", "--image_size", "3000x10", *POCKET[:2]]) == 2
    assert REFUSED in capsys.readouterr().err


def test_an_id_as_long_as_a_picture_is_not_printed_whole(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "iVBORw0KGgo" * 20_000
    folder = data.parent / "long_ids"
    shutil.copytree(data, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[0]["id"] = rows[1]["split"] = text
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["plan", *POCKET, "--dataset", str(folder), "--sft_config", "smoketest"]) == 0
    assert main(["data", "check", str(folder), "--output_dir", str(folder / "check")]) == 0
    assert main(["plan", "--base_model", "pocket", "--dataset", str(folder), "--sft_config", "smoketest"]) == 2
    assert main(["data", "import", text, "--format", "csv", "--output", str(folder / "out")]) == 2
    told = capsys.readouterr()
    assert max(map(len, (told.out + told.err).splitlines())) < 2_100 and REFUSED in told.err


def test_a_processor_that_fails_on_all_images_is_no_fault_of_one(data: Path, tmp_path: Path) -> None:
    encoder = Encoder(tiny_models.build("qwen2_5_vl")[1], PROMPT)
    encoder.processor.image_processor.patch_size = None  # as a broken preprocessor_config.json would have it
    samples = [ask(picture(number), "What?", "4", number) for number in range(3)]
    with pytest.raises(ModelError, match="fails on every one of the 3 images"):
        PreparedData(samples, encoder, "preparing")


@pytest.mark.parametrize(
    "family, size",
    [
        ("qwen3_vl", (10, 3000)),
        ("qwen2_vl", (1, 300)),
        ("lfm2_vl", (3000, 10)),
        ("mistral3", (300, 1)),
        ("smolvlm", (1, 1)),
        ("gemma3", (3000, 10)),
    ],
)
def test_every_family_takes_an_image_or_names_it(family: str, size: tuple[int, int]) -> None:
    if family not in tiny_models.FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    encoder = Encoder(tiny_models.build(family)[1], PROMPT)
    image = ImageRef.from_bytes(png("red", size), "odd.png")
    bad, good = ask(image, "Odd?", "1", 1), ask(picture(0), "What?", "4", 2)
    data = PreparedData([bad, good], encoder, "preparing")
    gone = [item.id for item in data.left_out]
    if family in ("smolvlm", "gemma3"):
        assert gone == [] and len(data) == 2
        return
    assert gone == [bad.id] and len(data) == 1
    assert data.left_out[0].reason == UNPROCESSABLE and "odd.png" in data.left_out[0].detail
    with pytest.raises(SampleError, match="odd.png"):
        encoder.encode([bad])


def test_an_image_exchanged_during_the_training_is_the_samples_fault(data: Path, tmp_path: Path) -> None:
    """Between preparation and step a picture may become one that the processor refuses."""
    path = tmp_path / "a.png"
    shutil.copy(data / "0.png", path)
    encoder = Encoder(tiny_models.build("qwen2_5_vl")[1], PROMPT)
    sample = ask(ImageRef.from_path(path), "What?", "4")
    encoder.encode([sample])
    shutil.copy(data / "long.png", path)
    with pytest.raises(SampleError, match="cannot process the image"):
        encoder.process_images(sample)

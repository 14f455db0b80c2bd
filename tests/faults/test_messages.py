"""What a user is told for each mistake, through the real command line: one message, no traceback, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import tiny_models
from vlm_sft.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen2_5_vl", tmp_path_factory.mktemp("base"))


def rows(folder: Path, count: int = 20) -> list[dict[str, object]]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index in range(count):
        Image.new("RGB", (40, 30), (index * 9 % 256, 80, 120)).save(folder / f"{index}.png")
        made.append({"image": f"{index}.png", "question": f"Which number is {index}?", "answer": str(index)})
    return made


def write(folder: Path, lines: list[object]) -> Path:
    path = folder / "own.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def train(base: Path | str, data: object, output: Path, *more: str) -> int:
    return main(
        [
            "train",
            "--base_model",
            str(base),
            "--dataset",
            str(data),
            "--output_dir",
            str(output),
            "--max_steps",
            "1",
            "--eval_benchmarks",
            "none",
            "--report_to",
            "none",
            *more,
        ]
    )


def refused(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    message = capsys.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    assert message.count("error: ") == 1, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def test_missing_image(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = rows(tmp_path / "d")
    (tmp_path / "d" / "3.png").unlink()
    data = write(tmp_path / "d", lines)
    refused(train(base, data, tmp_path / "o"), capsys, "3.png", "line 4", "left_out.jsonl", "--max_left_out")
    named = [json.loads(line) for line in (tmp_path / "o" / "left_out.jsonl").read_text().splitlines()]
    assert len(named) == 1 and "3.png" in named[0]["detail"]


def test_truncated_image_can_be_allowed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [row | {"split": "train" if number < 15 else "val"} for number, row in enumerate(rows(tmp_path / "d"))]
    picture = tmp_path / "d" / "5.png"
    Image.effect_noise((200, 200), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[:-2000])
    data = write(tmp_path / "d", lines)
    refused(train(base, data, tmp_path / "o"), capsys, "5.png", "truncated")
    assert train(base, data, tmp_path / "o2", "--max_left_out", "0.1") == 0
    facts = json.loads((tmp_path / "o2" / "data.json").read_text())
    assert sum(facts["left_out"].values()) == 1
    assert facts["train"]["samples"] + facts["eval"]["samples"] == 19


def test_broken_json_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[object] = list(rows(tmp_path / "d"))
    lines[6] = '{"image": "6.png", "question": '
    refused(train(base, write(tmp_path / "d", lines), tmp_path / "o"), capsys, "own.jsonl", "line 7", "JSON")


def test_empty_answer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = rows(tmp_path / "d")
    lines[2]["answer"] = "  "
    refused(train(base, write(tmp_path / "d", lines), tmp_path / "o"), capsys, "empty answer", "line 3")


def test_recipe_mistakes_come_together(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"learning_rat": 1e-4, "num_train_epochs": "two", "warmup_ratio": 3}))
    code = train(base, "easy_vqa", tmp_path / "o", "--sft_config", str(recipe))
    refused(code, capsys, "learning_rat", "learning_rate", "num_train_epochs", "warmup_ratio", "recipe.json")


def test_missing_column(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"image": [{"bytes": b"", "path": "a.png"}], "query": ["?"], "human_or_machine": [0]})
    pq.write_table(table, tmp_path / "train.parquet")
    code = train(base, f"chartqa@{tmp_path}", tmp_path / "o")
    refused(code, capsys, "label", "train.parquet", "query")


@pytest.mark.parametrize("offline", ["1", ""])
def test_no_network(
    offline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", bool(offline))
    if not offline:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the Hub's repetitions
    refused(train("nobody/no-such-model-7B", "easy_vqa", tmp_path / "m"), capsys, "nobody/no-such-model-7B", "pocket")


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(train("./no_such_folder", "easy_vqa", tmp_path / "o"), capsys, "no_such_folder", "Hub id")


def test_unknown_dataset(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(train(base, "chartq", tmp_path / "o"), capsys, "chartq", "chartqa")


def test_output_folder_holds_another_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d", list(rows(tmp_path / "d")))
    assert train(base, data, tmp_path / "o") == 0
    before = (tmp_path / "o" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    refused(train(base, data, tmp_path / "o"), capsys, "another run", "--resume", "--overwrite_output_dir")
    assert (tmp_path / "o" / "adapter_model.safetensors").read_bytes() == before


def test_targets_that_match_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d", list(rows(tmp_path / "d")))
    code = train(base, data, tmp_path / "o", "--target_modules", "query,qkv")
    refused(code, capsys, "'query'", "'qkv'", "outside it", "visual", "q_proj")


def test_unwritable_output(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(train(base, "easy_vqa", Path("/proc/vlm_sft_output")), capsys, "/proc/vlm_sft_output", "write")
    (tmp_path / "file").write_text("")
    refused(train(base, "easy_vqa", tmp_path / "file"), capsys, "is a file")


def test_text_only_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(train(tmp_path / "llama", "easy_vqa", tmp_path / "o"), capsys, "llama", "image-text-to-text")


def test_adapter_that_is_none(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        [
            "eval",
            "--base_model",
            str(base),
            "--adapter",
            str(tmp_path),
            "--benchmark",
            "demo_charts",
            "--limit",
            "2",
            "--output_dir",
            str(tmp_path / "o"),
        ]
    )
    refused(code, capsys, str(tmp_path), "adapter_config.json")

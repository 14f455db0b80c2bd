"""`vlm-sft export`: what plain transformers and PEFT make of the folder, what is refused, and what the card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.adapters import PROMPT, save_adapter, save_base
from vlm_sft.cli.main import main
from vlm_sft.export import run as export_run
from vlm_sft.model.layout import empty_model
from vlm_sft.model.load import find_base
from vlm_sft.model.saved_adapter import require_fit
from vlm_sft.model.vllm_rules import lora_settings, max_lora_rank, not_for_vllm

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "lora")


def export(adapter: Path, output: Path, *flags: str) -> int:
    return main(["export", "--adapter", str(adapter), "--output_dir", str(output), "--questions", "2", *flags])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def plain_logits(model: Any, processor: Any) -> torch.Tensor:
    """Logits for one question about a grey gradient, by plain transformers alone."""
    picture = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": PROMPT.template.replace("{question}", "How many?")}],
    }
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    """The adapter as plain PEFT opens it, with the image bounds of its prompt."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base)
    processor.image_processor.size = {"shortest_edge": 28 * 28 * 4, "longest_edge": PROMPT.max_pixels}
    return plain_logits(PeftModel.from_pretrained(model, str(adapter)), processor)


def by_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return plain_logits(model, AutoProcessor.from_pretrained(folder))


@pytest.mark.parametrize(
    "recipe",
    [{}, {"use_dora": True, "use_rslora": True}, {"train": "language,projector"}, {"train": "vision"}],
    ids=["lora", "dora and rslora", "projector", "vision"],
)
def test_a_merged_folder_is_the_adapter(base: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **recipe)
    assert export(adapter, tmp_path / "merged", "--merge") == 0
    expected = by_peft(base, adapter)
    near = 1e-3 * float(expected.std())
    torch.testing.assert_close(by_transformers(tmp_path / "merged"), expected, rtol=1e-3, atol=near)
    untuned = plain_logits(AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base))
    assert untuned.shape != expected.shape or (untuned - expected).abs().max() > 0.1
    check = report_of(tmp_path / "merged")["verification"]
    assert check["passed"] and check["identical_answers"] == check["questions"] == 2
    assert check["largest_difference"] <= check["tolerance"] < check["effect"]


def test_a_merged_folder_holds_all_that_a_model_needs(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, tmp_path / "merged", "--merge", "--dtype", "bfloat16") == 0
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "prompt.json",
        "README.md",
        "export.json",
    }
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert set(ours) == set(theirs)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "vlm_sft" not in json.dumps(config)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_processor.size["longest_edge"] == PROMPT.max_pixels
    report = report_of(tmp_path / "merged")
    assert report["kind"] == "merged" and report["dtype"] == "bfloat16" and report["adapted_layers"] == 6
    assert 0 < report["verification"]["largest_difference"] < 0.05
    assert str(tmp_path) not in (tmp_path / "merged" / "README.md").read_text() + json.dumps(report)


def test_an_adapter_folder_opens_with_plain_peft(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapter, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        "prompt.json",
        "README.md",
        "export.json",
    }
    assert torch.equal(by_peft(base, tmp_path / "out"), by_peft(base, adapter))
    report = report_of(tmp_path / "out")
    assert report["vllm"] == {"loads": True, "reasons": [], "max_lora_rank": 8}  # vLLM takes no 4
    assert "--enable-lora --max-lora-rank 8 --lora-modules" in capsys.readouterr().out
    assert report["verification"]["largest_difference"] < 1e-5
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def refused(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.count("error: ") == 1
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(export(adapter, tmp_path / "mine"), capsys, "not empty", "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_an_export_that_answers_otherwise_is_not_published(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = export_run.write_merged

    def spoil(model: Any, base: Any, folder: Path, dtype: torch.dtype) -> None:
        with torch.no_grad():
            model.get_base_model().lm_head.weight.mul_(-1)
        genuine(model, base, folder, dtype)

    monkeypatch.setattr(export_run, "write_merged", spoil)
    refused(export(adapter, tmp_path / "merged", "--merge"), capsys, "does not answer as the adapter does", "0 of 2")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_loses_the_adapter_is_not_published(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits near enough for a number format are not near enough when the adapter itself changes no more than that."""
    weak = save_adapter(base, tmp_path / "weak", scale=0.004)
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    code = export(weak, tmp_path / "merged", "--merge", "--dtype", "bfloat16")
    refused(code, capsys, "does not answer as the adapter does", "the adapter changes them by")
    assert not (tmp_path / "merged").exists()


def test_a_dead_adapter_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = save_adapter(base, tmp_path / "dead", scale=0.0)
    refused(export(dead, tmp_path / "out", "--merge"), capsys, "changes nothing", "all 6 of its lora_B")


def change(adapter: Path, folder: Path, rename: tuple[str, str] | None = None, drop: str = "") -> Path:
    """A copy of an adapter with tensors renamed or left out."""
    folder.mkdir()
    tensors = load_file(adapter / WEIGHTS)
    if rename:
        tensors = {name.replace(*rename): value for name, value in tensors.items()}
    save_file({name: value for name, value in tensors.items() if not drop or drop not in name}, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("rename", "drop", "words"),
    [
        (("model.language_model.layers", "model.layers"), "", ("names of transformers before 4.52", "model.layers.0")),
        ((".lora_A.weight", ".lora_a"), "", ("6 of its 12 tensors have no place", ".lora_a")),
        (None, "layers.1.self_attn.v_proj.lora_B", ("1 of the 12 tensors", "layers.1.self_attn.v_proj.lora_B")),
    ],
    ids=["layers of another layout", "unknown tensors", "half a pair"],
)
def test_tensors_that_loaders_pass_over_are_named(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rename: Any, drop: str, words: tuple[str, ...]
) -> None:
    broken = change(adapter, tmp_path / "broken", rename, drop)
    refused(export(broken, tmp_path / "out"), capsys, *words, "without a word")


@pytest.mark.parametrize(
    ("recipe", "word"),
    [({"use_dora": True}, "no DoRA"), ({"train": "language,projector"}, "no fully trained modules (1, e.g. model")],
)
def test_what_vllm_does_not_load_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], word: str
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **recipe)
    refused(export(adapter, tmp_path / "out"), capsys, word, "--merge", "--peft_only")
    assert export(adapter, tmp_path / "out", "--peft_only") == 0
    assert report_of(tmp_path / "out")["vllm"]["loads"] is False
    assert "vllm serve" not in capsys.readouterr().out  # it would not start


def test_lora_on_the_vision_tower_needs_a_flag_of_vllm(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = change(adapter, tmp_path / "moved")
    tensors = load_file(moved / WEIGHTS)
    name = "base_model.model.model.visual.blocks.0.attn.proj.lora_{}.weight"
    save_file({**tensors, name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(32, 4)}, moved / WEIGHTS)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "blocks.0.attn.proj"]
    (moved / "adapter_config.json").write_text(json.dumps(config))
    found_base = find_base(str(base))
    contents = require_fit(moved, found_base)
    assert len(contents.layers) == 7 and not contents.silent
    model = empty_model(found_base.path)
    assert not_for_vllm(config | {"r": 1024}, [*contents.layers, "lm_head"], model) == (
        "rank 1024 is above vLLM's largest, 512",
        "vLLM adapts language model, tower and projector only, not 1 layers such as lm_head",
    )
    assert not_for_vllm(config, contents.layers, model) == ()
    tower = {"max_lora_rank": 8, "enable_tower_connector_lora": True}
    assert lora_settings(config, contents.layers, model) == tower
    inside = [path for path in contents.layers if "visual" not in path]
    assert lora_settings(config, inside, model) == {"max_lora_rank": 8}
    assert export(moved, tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["vllm"] == {"loads": True, "reasons": [], **tower}
    said = capsys.readouterr()
    assert "--enable-lora --enable-tower-connector-lora --max-lora-rank 8" in said.out
    assert "LoRA on the vision tower or projector" in said.err


@pytest.mark.parametrize(
    ("rank", "taken"), [(1, 8), (8, 8), (9, 16), (24, 32), (100, 128), (257, 320), (321, 512), (512, 512), (513, None)]
)
def test_vllm_is_told_the_next_rank_that_it_takes(rank: int, taken: int | None) -> None:
    assert max_lora_rank({"r": rank}) == max_lora_rank({"r": 1, "rank_pattern": {"q_proj": rank}}) == taken


def test_every_family_merges(tmp_path: Path) -> None:
    for family in ("smolvlm", "llava", "gemma3", "paligemma", "qwen3_vl"):
        base = save_base(tmp_path / family / "base", family)
        prompt = PROMPT.with_pixels(None, None)
        object.__setattr__(prompt, "max_pixels", None)
        adapter = save_adapter(base, tmp_path / family / "adapter", prompt=prompt)
        assert export(adapter, tmp_path / family / "merged", "--merge") == 0, family
        assert report_of(tmp_path / family / "merged")["verification"]["passed"], family


def a_run(adapter: Path, folder: Path) -> Path:
    """A checkpoint of a run with its files: results as training writes them, a forecast, a saved picture."""
    checkpoint = change(adapter, folder.with_name("tmp"))
    folder.mkdir()
    (checkpoint).rename(folder / "checkpoint-8")
    PROMPT.save(folder / "checkpoint-8")
    row = {
        "n": 400,
        "metric": "chartqa_relaxed_accuracy",
        "synthetic": False,
        "base": {"accuracy": 0.52, "interval": [0.471, 0.569], "seconds": 3.0},
        "tuned": {"accuracy": 0.61, "interval": [0.561, 0.657], "seconds": 3.0},
        "difference": 0.09,
        "difference_interval": [0.04, 0.14],
        "p_value": 0.0007,
        "verdict": "tuned is better",
        "smallest_detectable_difference": 0.048,
        "splits": {},
    }
    files = {
        "results.json": {"schema": 1, "benchmarks": {"chartqa": row}},
        "recipe.json": {"learning_rate": 0.0002, "lora_r": 4, "target_modules": ["q_proj", "v_proj"]},
        "data.json": {
            "train": {"samples": 1200, "images": 800, "by_dataset": {"chartqa": 1200}, "synthetic": []},
            "left_out": {"image cannot be read": 3},
        },
        "run.json": {
            "schema": 1,
            "base_model": "tiny",
            "steps": 8,
            "wall_seconds": 12.5,
            "status": "finished",
            "forecast": {"time_seconds": {"value": 10.0, "low": 8.0, "high": 13.0}, "actual": {"time_seconds": 12.5}},
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    predictions = folder / "evaluation" / "tuned" / "chartqa"
    predictions.mkdir(parents=True)
    (folder / "evaluation" / "images").mkdir()
    Image.radial_gradient("L").resize((70, 60)).convert("RGB").save(folder / "evaluation" / "images" / "a.png")
    rows = [
        {"id": "1", "image": "images/a.png", "question": "How wide is the ring?", "prediction": "", "answers": ["2"]},
        {"id": "2", "image": "../../../outside.png", "question": "What is outside?", "prediction": "", "answers": []},
    ]
    (predictions / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder / "checkpoint-8"


def test_the_card_tells_what_the_run_measured(adapter: Path, tmp_path: Path) -> None:
    checkpoint = a_run(adapter, tmp_path / "run")
    assert export(checkpoint, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "pipeline_tag: image-text-to-text",
        "1,200 questions on 800 images: chartqa 1,200",
        "image cannot be read 3",
        "| learning_rate | 0.0002 |",
        "52.0",
        "61.0",
        "56.1",
        "65.7",
        "chartqa: tuned is better",
        "differences below 4.8 points",
        "| Time | 10 s | 8.0 s to 13 s |",
        PROMPT.template.split("\n")[1],
    ):
        assert text in card, f"{text!r} is not in:\n{card}"
    check = report_of(tmp_path / "out")["verification"]
    assert check["source"] == "pictures that the run saved"
    assert [row["question"] for row in check["examples"]] == ["How wide is the ring?"]

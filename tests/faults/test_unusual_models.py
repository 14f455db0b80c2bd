"""Whole model folders that are unusual all the same: each command works, or says in one line what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

from tests.adapters import save_adapter, save_base
from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.model.families import FAMILIES

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unusual")
    save_adapter(save_base(folder / "base"), folder / "lora")
    (folder / "a.png").write_bytes(png())
    rows = [
        {"image": "a.png", "question": f"Q{n}?", "answer": "1", "split": split}
        for n, split in enumerate(("train", "validation", "test"))
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def commands(place: Path, model: Path, output: Path) -> dict[str, list[str]]:
    """The commands that compute with a base model."""
    base, own = ["--base_model", str(model)], str(place / "own.jsonl")
    short = ["--max_new_tokens", "4"]
    train = ["--max_steps", "1", "--report_to", "none", "--output_dir", str(output / "train"), *short]
    export = ["--adapter", str(place / "lora"), "--merge", "--questions", "1", "--output_dir", str(output / "merged")]
    return {
        "train": ["train", *base, "--dataset", own, *train],
        "eval": ["eval", *base, "--benchmark", own, "--output_dir", str(output / "eval"), *short],
        "ask": ["ask", str(place / "a.png"), "What?", *base],
        "export": ["export", *base, *export],
    }


def edit(name: str, **changes: object) -> Change:
    """Set values of a JSON file; None takes a value away."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values |= changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def drop(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names] and None


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes] and None


def weights(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Change:
    """Change each weight, or leave it out."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        made = dict(filter(None, (change(name, value) for name, value in load_file(path).items())))
        save_file(made, path, {"format": "pt"})

    return rewrite


def to_tokenizer(folder: Path) -> None:
    """Put the chat template where older models have it."""
    template = folder / "chat_template.jinja"
    edit("tokenizer_config.json", chat_template=template.read_text(encoding="utf-8"))(folder)
    template.unlink()


def other_sections(folder: Path) -> None:
    """Let the axes of the rotary positions have other channels than a head has."""
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 1]
    (folder / "config.json").write_text(json.dumps(values))


REMOTE = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "contains Python code": (
        edit("config.json", model_type="x_vl", auto_map=REMOTE, architectures=["XModel"]),
        ("contains Python code",),
    ),
    "a family of a newer transformers": (
        edit("config.json", model_type="qwen9_vl", transformers_version="9.1.0"),
        ("qwen9_vl", "Transformers"),
    ),
    "a text model": (edit("config.json", model_type="qwen2"), ("'qwen2' is not an image-text-to-text model",)),
    "no token that ends an answer": (
        both(edit("tokenizer_config.json", eos_token=None), drop("generation_config.json")),
        ("no token ends an answer", "eos_token_id in generation_config.json"),
    ),
    "no chat template": (drop("chat_template.jinja"), ("chat template", "chat_template.jinja")),
    "the weights of the language model alone": (
        weights(lambda name, value: (name, value) if "visual" not in name else None),
        ("tensors of the model are not in its weights", "visual"),
    ),
    "a configuration that contradicts itself": (
        other_sections,
        ("cannot compute a question about an image", "of one model"),
    ),
    "the processor of another model": (
        lambda folder: (
            [
                shutil.copy(path, folder)
                for path in save_base(folder / "other", "llava").iterdir()
                if path.name.startswith(("processor", "token", "chat"))
            ]
            and None
        ),
        ("as its processor (LlavaProcessor) prepares it", "of one model"),
    ),
}
# An export compares the base and the settings of its pictures with the adapter's before anything else.
EARLIER = ("the weights of the language model alone", "the processor of another model")
WORKS: dict[str, Change] = {
    "no end token in the generation settings": drop("generation_config.json"),
    "the chat template in the tokenizer's settings alone": to_tokenizer,
    "weights in float16": both(weights(lambda name, value: (name, value.half())), edit("config.json", dtype="float16")),
    "weights in bfloat16": both(
        weights(lambda name, value: (name, value.bfloat16())), edit("config.json", dtype="bfloat16")
    ),
}


def model_with(place: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(place / "base", folder)
    change(folder)
    return folder


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    change, words = REFUSED[kind]
    model = model_with(place, tmp_path / "model", change)
    for verb, line in commands(place, model, tmp_path / "out").items():
        code = main(line)
        told = capsys.readouterr().err
        assert code == 2 and told.count("error: ") == 1 and "Traceback" not in told, (verb, told)
        if verb != "export" or kind not in EARLIER:
            assert all(word in told for word in words), (verb, told)


@pytest.mark.parametrize("kind", WORKS)
def test_it_works(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    model = model_with(place, tmp_path / "model", WORKS[kind])
    lines = commands(place, model, tmp_path / "out")
    for verb in ("train", "eval", "ask"):  # other weights are not the base of the adapter that an export takes
        assert main(lines[verb]) == 0, (verb, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes all in bfloat16")
def test_an_undeclared_family_that_fails_in_bfloat16_is_computed_in_float32(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def products_of_its_own(module: Qwen2_5_VLPatchMerger, rows: torch.Tensor) -> torch.Tensor:
        first, last = module.mlp[0], module.mlp[2]
        rows = module.ln_q(rows).view(-1, module.hidden_size)
        return F.linear(F.gelu(F.linear(rows, first.weight, first.bias)), last.weight, last.bias)

    asked = commands(place, place / "base", tmp_path)
    narrow, told = ["--bf16", "true", "--eval_benchmarks", "none"], "fails with its products in bfloat16"
    monkeypatch.delitem(FAMILIES, "qwen2_5_vl")
    assert main([*asked["train"], *narrow, "--output_dir", str(tmp_path / "narrow")]) == 0
    assert told not in capsys.readouterr().out
    monkeypatch.setattr(Qwen2_5_VLPatchMerger, "forward", products_of_its_own)
    assert main([*asked["train"], *narrow]) == 0
    assert capsys.readouterr().out.count(told) == 1
    run = Path(asked["train"][asked["train"].index("--output_dir") + 1])
    assert main(["eval", "--adapter", str(run), *asked["eval"][asked["eval"].index("--benchmark") :]]) == 0
    again = told in capsys.readouterr().out  # as the training: loaded in bfloat16 where this processor has it
    evaluated = Path(asked["eval"][asked["eval"].index("--output_dir") + 1])
    formats = [
        [json.loads((folder / "run.json").read_text()).get(key) for key in ("dtype", "loaded_dtype")]
        for folder in (tmp_path / "narrow", run, evaluated)
    ]
    assert formats[:2] == [["bfloat16", None], ["float32", "bfloat16"]]
    assert formats[2] == ["float32", "bfloat16" if again else None]

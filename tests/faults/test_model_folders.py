"""A model folder that is not whole is one message in every command, before anything long starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import save_adapter, save_base
from tests.pictures import png
from vlm_sft.cli.main import main

CONFIGS = ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json", "prompt.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_adapter(save_base(folder / "base"), folder / "lora")
    (folder / "a.png").write_bytes(png())
    rows = [
        {"image": "a.png", "question": f"Q{n}?", "answer": "1", "split": split}
        for n, split in enumerate(("train", "validation", "test"))
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def commands(place: Path, model: Path, output: Path) -> dict[str, list[str]]:
    """Every command that opens a base model."""
    data = ["--dataset", str(place / "own.jsonl")]
    base = ["--base_model", str(model)]
    return {
        "train": ["train", *base, *data, "--output_dir", str(output / "train"), "--max_steps", "1"],
        "plan": ["plan", *base, *data, "--output_dir", str(output / "plan")],
        "recommend": ["recommend", "--hours", "1", *base, *data],
        "eval": ["eval", *base, "--benchmark", str(place / "own.jsonl"), "--output_dir", str(output / "eval")],
        "ask": ["ask", str(place / "a.png"), "What?", *base],
        "export": ["export", "--adapter", str(place / "lora"), *base, "--output_dir", str(output / "export")],
    }


def refused(place: Path, model: Path, output: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    for verb, line in commands(place, model, output).items():
        if verb == "export" and "prompt.json" in words:  # the prompt of an adapter is beside it
            continue
        code = main(line)
        message = capsys.readouterr().err
        assert code == 2, f"{verb}: {message}"
        assert message.count("error: ") == 1 and "Traceback" not in message and len(message) < 2000, message
        for word in words:
            assert word in message, f"{verb}: {word!r} is not in: {message}"
        assert not list(output.iterdir()) if output.exists() else True, verb


def _drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names] and None


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _shards(*there: str) -> Callable[[Path], None]:
    """Weights in two files, of which some are there."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        where = {name: file for file, part in parts.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        for file in there:
            save_file({name: tensors[name] for name in parts[file]}, folder / file, {"format": "pt"})

    return write


def _pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _folder(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return make


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = (
    {
        "no weights": (_drop("model.safetensors"), ("its weights are missing",)),
        "pickles only": (_pickles, ("pytorch_model.bin", "pickles", "safetensors")),
        "a shard is absent": (_shards("model-1-of-2.safetensors"), ("model-2-of-2.safetensors is missing",)),
        "all shards are absent": (_shards(), ("model-1-of-2.safetensors is missing", "model-2-of-2.safetensors is")),
        "index without a map": (_write("model.safetensors.index.json", b'{"weight_map": []}'), ("has no weight_map",)),
        "index that leads away": (
            _write("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}'),
            ("another folder",),
        ),
        "weights cut off": (_cut, ("model.safetensors has", "instead of")),
        "a pointer of Git LFS": (
            _write("model.safetensors", b"version https://git-lfs.github.com/"),
            ("git lfs pull",),
        ),
        "empty weights": (_write("model.safetensors", b""), ("model.safetensors is cut off",)),
        "no tokenizer": (_drop("tokenizer.json"), ("its tokenizer is missing",)),
        "no processor": (_drop("processor_config.json"), ("its image processor is missing",)),
        "no config": (_drop("config.json"), ("no config.json",)),
        "config is a folder": (_folder("config.json"), ("config.json: it is no file",)),
        "config is a list": (_write("config.json", b"[]"), ("config.json: it holds a list",)),
        "config of an unknown type": (_write("config.json", b'{"model_type": "none"}'), ("cannot be opened", "none")),
        "config of odd values": (
            _write("config.json", b'{"model_type": "qwen2_5_vl", "text_config": 3}'),
            ("cannot be opened",),
        ),
        "tokenizer is no tokenizer": (_write("tokenizer.json", b"{}"), ("cannot be opened",)),
        "tokenizer too deep": (_write("tokenizer.json", b"[" * 100_000), ("cannot be opened",)),
    }
    | {
        f"prompt with {key} {value}": (
            _write("prompt.json", f'{{"schema": 1, "{key}": {value}}}'.encode()),
            ("prompt.json", f"{key} is "),
        )
        for key, value in {
            "template": '["{question}"]',
            "max_new_tokens": "0",
            "max_pixels": "true",
            "system": "1",
        }.items()
    }
    | {
        f"{name} {kind}": (_write(name, content), ("cannot read", name))
        for name in CONFIGS
        for kind, content in {"too deep": b'{"a": ' * 100_000, "torn": b'{"a": 1', "no UTF-8": b'{"a": "\xff"}'}.items()
    }
)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_not_whole(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, words = BROKEN[kind]
    model = tmp_path / "model"
    shutil.copytree(place / "base", model)
    damage(model)
    refused(place, model, tmp_path / "out", capsys, str(model), *words)


def test_weights_without_a_layer_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would give the layer random weights."""
    model = tmp_path / "model"
    shutil.copytree(place / "base", model)
    tensors = {k: v for k, v in load_file(model / "model.safetensors").items() if ".layers.1." not in k}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for verb, line in commands(place, model, tmp_path / "out").items():
        if verb in ("train", "eval", "ask"):
            assert main(line) == 2, verb
            assert "tensors of the model are not in its weights" in capsys.readouterr().err, verb


@pytest.mark.parametrize("prefix", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
def test_whole_folders_are_opened(place: Path, tmp_path: Path, prefix: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / "base", model)
    _shards("model-1-of-2.safetensors", "model-2-of-2.safetensors")(model)
    (model / "prompt.json").write_text(prefix + json.dumps({"schema": 1, "max_new_tokens": 2}))
    assert main(commands(place, model, tmp_path / "out")["ask"]) == 0


def test_an_adapter_as_base_is_told_in_every_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "lora"
    ways = (f"--adapter {run}", f"export --adapter {run} --merge")
    refused(place, run, tmp_path / "out", capsys, "that is an adapter", *ways)
    both = tmp_path / "both"  # transformers would open the base that the adapter names
    shutil.copytree(place / "base", both)
    shutil.copy(run / "adapter_config.json", both)
    refused(place, both, tmp_path / "out", capsys, "that is an adapter")

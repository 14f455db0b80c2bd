"""An adapter that does not fit its base, or belongs to another, is refused by every command that opens one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.adapters import save_adapter, save_base
from vlm_sft.cli.main import main
from vlm_sft.common.errors import ModelError
from vlm_sft.common.manifest import write_manifest
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.evaluate.options import EvalOptions
from vlm_sft.evaluate.run import _find_base
from vlm_sft.model.saved_adapter import BASE_WEIGHTS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VERBS = ("eval", "ask", "export")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another of its shape, one of another family, a picture, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base")
    tiny_models.save("qwen2_5_vl", folder / "other", seed=1)
    save_base(folder / "llava", "llava")
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(folder / "a.png")
    save_adapter(folder / "base", folder / "lora")
    return folder


def copy(adapter: Path, folder: Path, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Path:
    """A copy of an adapter with other tensors or settings."""
    shutil.copytree(adapter, folder)
    if tensors:
        save_file(tensors(load_file(adapter / WEIGHTS)), folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def command(verb: str, place: Path, adapter: Path, output: Path, base: Path | None = None, *flags: str) -> int:
    own = ["--adapter", str(adapter), "--base_model", str(base or place / "base"), *flags]
    words = {
        "eval": ["eval", "--benchmark", "demo_charts", "--limit", "2", "--output_dir", str(output / "eval"), *own],
        "ask": ["ask", str(place / "a.png"), "How many?", *own],
        "export": ["export", "--merge", "--questions", "1", "--output_dir", str(output / "export"), *own],
    }
    return main(words[verb])


def refused(
    place: Path, adapter: Path, output: Path, capsys: pytest.CaptureFixture[str], *words: str, base: Path | None = None
) -> None:
    """All commands refuse the adapter with the same words, and leave nothing."""
    for verb in VERBS:
        code = command(verb, place, adapter, output, base)
        message = capsys.readouterr().err
        assert code == 2, f"{verb}: {message}"
        assert message.count("error: ") == 1 and "Traceback" not in message
        for word in words:
            assert word in message, f"{verb}: {word!r} is not in: {message}"
        assert not (output / "eval").exists() and not (output / "export").exists(), verb


def _no_v(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if "v_proj" not in name}


def _first_layer(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if "layers.0." in name}


def _named(before: str, after: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(before, after): value for name, value in tensors.items()}


def _with(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


def _all(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(value).contiguous() for name, value in tensors.items()}


EMBEDDING = "base_model.model.model.language_model.embed_tokens.weight"
DAMAGED: dict[str, tuple[Callable[[Tensors], Tensors] | None, dict[str, Any], tuple[str, ...]]] = {
    "older transformers": (
        _named("model.language_model.layers", "model.layers"),
        {},
        ("names of transformers before 4.52", "layers.0."),
    ),
    "no base_model prefix": (_named("base_model.model.", ""), {}, ("12 of its 12 tensors have no place",)),
    "adapter name in the names": (_named("lora_A.weight", "lora_A.default.weight"), {}, ("6 of its 12 tensors",)),
    "half the layers": (_first_layer, {}, ("6 of the 12 tensors that it should have are missing", "layers.1.")),
    "q and o for q, v and o": (_no_v, {}, ("4 of the 12 tensors", "v_proj")),
    "more targets in the config": (
        None,
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        ("4 of the 16", "k_proj"),
    ),
    "another rank": (None, {"r": 8}, ("12 tensors have another shape", "(4, 64) instead of (8, 64)")),
    "a wider model": (_all(lambda value: torch.cat([value, value], 1)), {}, ("12 tensors have another shape",)),
    "an embedding beside it": (_with(EMBEDDING, torch.ones(264, 64)), {}, ("1 of its 13 tensors", "embed_tokens")),
    "no tensor": (lambda _: {}, {}, ("12 of the 12 tensors that it should have are missing",)),
    "zero": (_all(torch.zeros_like), {}, ("changes nothing", "all 6 of its lora_B")),
    "not finite": (_all(lambda value: value * float("nan")), {}, ("12 tensors hold numbers that are not finite",)),
    "DoRA without its vectors": (None, {"use_dora": True}, ("6 of the 18 tensors", "lora_magnitude_vector")),
    "no trained module": (None, {"modules_to_save": ["lm_head"]}, ("1 of the 13 tensors", "lm_head")),
    "targets that are not there": (None, {"target_modules": ["c_attn"]}, ("c_attn", "does not fit")),
    "another kind": (None, {"peft_type": "IA3"}, ("not a plain LoRA adapter", "IA3")),
    "biases": (None, {"bias": "all"}, ("bias is 'all'",)),
    "a module to import": (None, {"megatron_config": {"a": 1}, "megatron_core": "os"}, ("megatron_config",)),
    "an init that changes the base": (None, {"init_lora_weights": "pissa_niter_4"}, ("pissa_niter_4",)),
    "a rank that is text": (None, {"r": "four"}, ("does not fit",)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_does_not_fit_is_refused_by_all(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tensors, config, words = DAMAGED[kind]
    refused(place, copy(place / "lora", tmp_path / "adapter", tensors, **config), tmp_path, capsys, *words)


def test_another_family_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(place, place / "lora", tmp_path, capsys, "does not fit", "llava", base=place / "llava")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", ("holds a list",)),
        (b"{", ("cannot read",)),
        (b"[" * 100_000, ("nested deeper",)),
        (b'{"r": 4, "r": 8}', ("'r' comes twice",)),
        (b'{"lora_alpha": NaN}', ("not a finite number",)),
        (b"\xff\xfe{}", ("cannot read",)),
        (b'{"peft_type": "LORA"}', ("does not fit",)),
    ],
)
def test_broken_settings_are_one_message(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: tuple[str, ...]
) -> None:
    adapter = copy(place / "lora", tmp_path / "adapter")
    (adapter / CONFIG).write_bytes(content)
    refused(place, adapter, tmp_path, capsys, *words)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x04pickle"])
def test_a_broken_weights_file_is_one_message(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    adapter = copy(place / "lora", tmp_path / "adapter")
    (adapter / WEIGHTS).write_bytes(content)
    refused(place, adapter, tmp_path, capsys, WEIGHTS, "cannot be read")


def test_a_pickled_adapter_is_not_opened(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = copy(place / "lora", tmp_path / "adapter")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(place, adapter, tmp_path, capsys, "adapter_model.bin is a pickle")


def recorded(adapter: Path, base: Path) -> Path:
    """The adapter with a manifest as a training writes it."""
    write_manifest(adapter, [WEIGHTS, CONFIG], {"identity": {BASE_WEIGHTS: weights_fingerprint(str(base))}})
    return adapter


@pytest.mark.parametrize("by_weights", [True, False], ids=["recorded weights", "recorded name"])
def test_another_base_is_refused_unless_allowed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_weights: bool
) -> None:
    adapter = copy(place / "lora", tmp_path / "adapter", base_model_name_or_path="/gone/base")
    if by_weights:
        recorded(adapter, place / "base")
    refused(place, adapter, tmp_path, capsys, "was trained on", "--allow_other_base", base=place / "other")
    for verb in VERBS:
        assert command(verb, place, adapter, tmp_path, place / "other", "--allow_other_base") == 0, verb
        assert "warning: --adapter" in (said := capsys.readouterr().err) and "is not that base" in said, verb


def test_a_base_of_the_same_name_with_other_weights_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "other", tmp_path / "base")
    adapter = recorded(copy(place / "lora", tmp_path / "adapter"), place / "base")
    refused(place, adapter, tmp_path, capsys, "its weights are others", base=tmp_path / "base")
    nameless = copy(place / "lora", tmp_path / "nameless", base_model_name_or_path=None)
    recorded(nameless, place / "base")
    refused(place, nameless, tmp_path, capsys, "its weights are others", base=tmp_path / "base")


def test_the_same_base_at_another_place_is_taken(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "base", tmp_path / "renamed")
    moved = copy(place / "lora", tmp_path / "adapter", base_model_name_or_path="/gone/somewhere")
    recorded(moved, place / "base")
    unrecorded = copy(place / "lora", tmp_path / "unrecorded", base_model_name_or_path="hub/Renamed")
    for adapter in (moved, unrecorded):
        for verb in VERBS:
            assert command(verb, place, adapter, tmp_path / adapter.name, tmp_path / "renamed") == 0, verb
            assert "is not that base" not in capsys.readouterr().err


def test_an_exported_adapter_knows_its_base(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = copy(place / "lora", tmp_path / "adapter")
    assert main(["export", "--adapter", str(adapter), "--questions", "1", "--output_dir", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / CONFIG).write_text((adapter / CONFIG).read_text().replace(str(place), "/gone"))
    shutil.copytree(place / "other", tmp_path / "base")
    refused(place, tmp_path / "out", tmp_path / "used", capsys, "its weights are others", base=tmp_path / "base")


def test_a_base_that_is_gone_is_asked_for(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = copy(place / "lora", tmp_path / "adapter", base_model_name_or_path="/gone/base")
    assert main(["ask", str(place / "a.png"), "How many?", "--adapter", str(adapter)]) == 2
    message = capsys.readouterr().err
    assert "was trained on /gone/base" in message and "pass --base_model" in message


def test_what_vllm_would_pass_over_is_refused_for_its_backend(place: Path, tmp_path: Path) -> None:
    dora = save_adapter(place / "base", tmp_path / "dora", use_dora=True)
    given: dict[str, Any] = {"benchmark": "demo_charts", "output_dir": tmp_path / "out"}
    options = EvalOptions(base_model=str(place / "base"), adapter=dora, backend="vllm", **given)
    with pytest.raises(ModelError, match="no DoRA"):
        _find_base(options)

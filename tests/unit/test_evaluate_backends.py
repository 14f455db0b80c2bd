"""The interface of backends: vLLM absent is one clear error; its requests carry our prompt and pictures."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.questions import questions
from tests.tiny_models import qwen2_5_vl
from vlm_sft.cli.main import main
from vlm_sft.common.artifacts import read_json
from vlm_sft.common.errors import ModelError
from vlm_sft.data.encode import Encoder
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.threads import ordered_map
from vlm_sft.evaluate.backends import VllmBackend, vllm_requests
from vlm_sft.model.load import find_base
from vlm_sft.model.vllm_rules import splitting_problem


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_absent_is_told_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        [
            "eval",
            "--base_model",
            "pocket",
            "--benchmark",
            "demo_charts",
            "--output_dir",
            str(tmp_path / "out"),
            "--backend",
            "vllm",
        ]
    )
    assert code == 2
    assert "vllm is not installed\n  fix: pip install 'vlm-sft[vllm]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vllm_is_asked_with_our_prompt_and_pictures() -> None:
    _, processor = qwen2_5_vl()
    encoder = Encoder(processor, PromptSettings("Q: {question}", "Be brief."))
    samples = questions(3, 2)
    requests = vllm_requests(encoder, samples)
    assert [request["prompt"] for request in requests] == [encoder.prompt_text(sample) for sample in samples]
    assert "Be brief." in requests[0]["prompt"]
    assert f"Q: {samples[1].question}" in requests[1]["prompt"]
    assert requests[0]["prompt"].count("<|image_pad|>") == 1
    assert requests[0]["multi_modal_data"]["image"][0].size == (72, 56)


EVAL = ["eval", "--base_model", "pocket", "--benchmark", "demo_charts", "--limit", "2", "--backend", "vllm"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in of vLLM was opened with, on a machine that seems to have four GPUs."""
    calls: list[dict[str, Any]] = []

    class LLM:
        """Answers everything with "red"."""

        def __init__(self, **arguments: Any) -> None:
            calls.append(arguments)

        def generate(self, requests: list[Any], greedy: Any, lora_request: Any, use_tqdm: bool) -> list[Any]:
            return [SimpleNamespace(outputs=[SimpleNamespace(text=" red", finish_reason="stop")]) for _ in requests]

    package, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM, package.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    request.LoRARequest = SimpleNamespace  # type: ignore[attr-defined]
    for module in (package, lora, request):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else it may be asked to compute something
    return calls


def test_vllm_splits_a_model_over_gpus(opened: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*EVAL, "--tensor_parallel_size", "3", "--output_dir", str(out)]) == 0
    (arguments,) = opened
    assert arguments["tensor_parallel_size"] == 3 and arguments["enable_lora"] is False
    assert read_json(out / "run.json")["tensor_parallel_size"] == 3
    (line, _) = (out / "demo_charts" / "predictions.jsonl").read_text().splitlines()
    assert '"prediction": "red"' in line


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ("2", "--tensor_parallel_size 2: pocket: its 3 attention heads cannot be shared out evenly over 2 GPUs"),
        ("8", "--tensor_parallel_size 8: this process sees 4 GPUs\n  fix: pass 1 to 4"),
        ("0", "--tensor_parallel_size 0: this process sees 4 GPUs"),
    ],
)
def test_a_number_of_gpus_that_does_not_fit_is_told_at_once(
    gpus: str, told: str, opened: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*EVAL, "--tensor_parallel_size", gpus, "--output_dir", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not opened and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("heads", "key_heads", "gpus", "problem"),
    [
        (28, 4, 4, None),
        (28, 4, 2, None),
        (28, 4, 8, "its 28 attention heads"),
        (64, 8, 16, None),  # two GPUs keep each head of keys
        (24, 6, 4, "its 6 heads of keys and values"),
        (16, None, 8, None),  # as many heads of keys as of queries
    ],
)
def test_heads_are_shared_out_evenly(heads: int, key_heads: int | None, gpus: int, problem: str | None) -> None:
    text = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=key_heads)
    found = splitting_problem(gpus, SimpleNamespace(get_text_config=lambda: text))
    assert found == problem if problem is None else found is not None and found.startswith(problem)


def test_what_stops_vllm_is_one_line(opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**arguments: Any) -> None:
        raise ValueError("No available memory for the cache blocks.\nTry more.")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", stop)
    with pytest.raises(ModelError, match="vLLM cannot open pocket \\(No available memory for the cache blocks.\\)"):
        VllmBackend(find_base("pocket"), None)


def test_a_map_in_threads_keeps_order_and_never_runs_far_before_the_consumer() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    for position, value in enumerate(ordered_map(make, range(8), 1, 2)):
        assert value == position**2
        assert len(made) <= position + 2 + 1
    assert made == list(range(8))


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    def make(item: int) -> int:
        if item == 1:
            raise ValueError("broken")
        return item

    results = ordered_map(make, range(3), 1, 2)
    assert next(results) == 0
    with pytest.raises(ValueError, match="broken"):
        next(results)

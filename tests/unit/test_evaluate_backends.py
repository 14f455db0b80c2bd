"""The interface of backends: vLLM absent is one clear error; its requests carry our prompt and pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.questions import questions
from tests.tiny_models import qwen2_5_vl
from vlm_sft.cli.main import main
from vlm_sft.data.encode import Encoder
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.threads import ordered_map
from vlm_sft.evaluate.backends import vllm_requests


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

"""The Hub is asked for a configuration once a command, also where it cannot be reached."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from tests.adapters import save_base
from vlm_sft.cli.main import main
from vlm_sft.common.errors import ModelError
from vlm_sft.common.hub_answers import forget_answers
from vlm_sft.model.hub import model_config, opened

NAME = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture()
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each name was asked for."""
    found: Counter[str] = Counter()
    for owner in (AutoConfig, AutoProcessor):
        real = owner.from_pretrained

        def counted(path: Any, *args: Any, real: Any = real, **settings: Any) -> Any:
            found[str(path)] += 1
            return real(path, *args, **settings)

        monkeypatch.setattr(owner, "from_pretrained", counted)
    return found


@pytest.mark.parametrize("data", [("--questions", "100"), ("--dataset", "demo_charts", "--max_train", "4")])
def test_all_recipes_ask_once(data: tuple[str, ...], asked: Counter[str]) -> None:
    command = ["recommend", "--hours", "1", "--base_model", NAME, "--gpu_type", "h100", *data]
    for commands in (1, 2):  # the next command asks again
        assert main(command) == 0
        assert asked == {NAME: commands}


def test_an_answer_is_kept_and_cannot_be_changed(
    asked: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, real = save_base(tmp_path / "base"), AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda path, **more: real(base if path == NAME else path, **more)
    )
    asked.clear()
    forget_answers()
    first = model_config(NAME)
    first.model_type = "other"
    assert model_config(NAME).model_type == "qwen2_5_vl" and asked == {str(base): 1}
    assert model_config(str(base)).model_type and asked == {str(base): 2}, "a folder is read again"
    forget_answers()
    assert model_config(NAME).model_type and asked == {str(base): 3}


def test_other_failures_are_not_kept() -> None:
    calls = []

    def damaged() -> None:
        calls.append(1)
        raise ValueError("the file is damaged")

    forget_answers()
    for count in (1, 2):
        with pytest.raises(ModelError, match="the file is damaged"):
            opened(damaged, NAME)
        assert len(calls) == count

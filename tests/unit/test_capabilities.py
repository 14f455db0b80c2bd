"""What a GPU or an installed package cannot do is said before anything starts, with what is used instead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlm_sft.cli.main import main
from vlm_sft.distributed.zero import OLDEST_DEEPSPEED
from vlm_sft.model.load import default_dtype, find_base


def card(monkeypatch: pytest.MonkeyPatch, name: str, major: int, hip: str | None = None) -> None:
    """Let PyTorch report a GPU of this name and capability; PyTorch's own answer about bfloat16 follows from them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # emulation works everywhere
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("name", "major", "hip", "dtype"),
    [
        ("Tesla V100-SXM2-16GB", 7, None, torch.float32),
        ("Tesla T4", 7, None, torch.float32),
        ("NVIDIA A100-SXM4-80GB", 8, None, torch.bfloat16),
        ("NVIDIA B200", 10, None, torch.bfloat16),
        ("AMD Instinct MI300X", 9, "7.0", torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_where_the_gpu_itself_has_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    major: int,
    hip: str | None,
    dtype: torch.dtype,
) -> None:
    card(monkeypatch, name, major, hip)
    assert torch.cuda.is_bf16_supported()  # what was asked before
    base = find_base("pocket")
    assert base.dtype is default_dtype() is dtype
    note = f"{name} does not support bfloat16, and emulating it is slower than float32: computing in float32"
    assert base.notes == ((note,) if dtype is torch.float32 else ())
    assert find_base("pocket", bf16=False).notes == () and find_base("pocket", bf16=True).dtype is torch.bfloat16
    warned = f"warning: --bf16 true: {name} does not support bfloat16" in capsys.readouterr().err
    assert warned is (dtype is torch.float32)


def test_a_forecast_for_such_a_card_warns_too(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--base_model", "Qwen/Qwen2.5-VL-3B-Instruct", "--questions", "1000", "--gpu_type", "V100-32GB"]
    assert main([*line, "--bf16", "true"]) == 0
    assert "warning: --bf16 true: V100-32GB does not support bfloat16" in capsys.readouterr().err
    assert main(line) == 0
    assert "bf16" not in capsys.readouterr().err


@pytest.mark.parametrize("found", ["0.18.9", "0.19.1", "0.9.0"])
def test_an_old_deepspeed_is_refused_with_the_line_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str
) -> None:
    package = tmp_path / "packages"
    (package / "deepspeed").mkdir(parents=True)
    (package / "deepspeed" / "__init__.py").touch()
    about = package / f"deepspeed-{found}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {found}\n")
    monkeypatch.syspath_prepend(str(package))
    out = tmp_path / "out"
    assert main(["train", "--base_model", "pocket", "--output_dir", str(out), "--deepspeed", "zero2"]) == 2
    message = capsys.readouterr().err
    assert f"DeepSpeed {found} is installed" in message
    assert f"fix: pip install 'deepspeed>={OLDEST_DEEPSPEED}'" in message and "Traceback" not in message
    assert not out.exists()
    extra = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert f'deepspeed = ["deepspeed>={OLDEST_DEEPSPEED}"]' in extra

"""The attention benchmark: every kernel that runs on a CPU computes the pack, and the table says what was measured."""

from __future__ import annotations

import sys

import pytest
import torch

import attention
from vlm_sft.model.attention import PackLayout

SMALL = [
    "--device",
    "cpu",
    "--images",
    "2",
    "--prefix",
    "20",
    "--questions",
    "2",
    "--question",
    "5",
    "--heads",
    "4",
    "--kv_heads",
    "2",
    "--width",
    "16",
    "--rounds",
    "1",
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kernels_of_a_cpu_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", *SMALL])
    rows = {row["kernel"]: row for row in attention.measure(attention.parse())}
    assert list(rows) == ["sdpa", "flex", "separate"]
    assert [row["tokens"] for row in rows.values()] == [60, 60, 100]
    assert all(row["difference"] < 1e-5 and row["forward_ms"] > 0 for row in rows.values())
    assert attention.main() == 0
    assert "| separate | 100 |" in capsys.readouterr().out


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions that see each other differ from the exact values, so the comparison can fail."""
    monkeypatch.setattr(sys, "argv", ["attention.py", *SMALL])
    joined = PackLayout(60, [[0, 20, 30], [30, 50, 60]])
    exact = attention.kernels

    def wrong(layout: PackLayout, device: torch.device) -> dict[str, attention.Timed]:
        return exact(layout, device) | {"flex": (attention.flex(joined, device), None)}

    monkeypatch.setattr(attention, "kernels", wrong)
    rows = {row["kernel"]: row for row in attention.measure(attention.parse())}
    assert rows["flex"]["difference"] > 0.1


def test_separate_sequences_repeat_the_prefix() -> None:
    layout, tokens = attention.separate_layout(PackLayout(9, [[0, 3, 5, 6], [6, 7, 9]]))
    assert tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert layout.branches == [[0, 5], [5, 9], [9, 12]] and layout.length == 12


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    with pytest.raises(SystemExit) as ended:
        attention.parse()
    assert ended.value.code == 2 and "there is no GPU" in capsys.readouterr().err

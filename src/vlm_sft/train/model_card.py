"""Writes the model card of a run's folder and of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from vlm_sft import __version__
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.manifest import naming
from vlm_sft.report.card import card, may_write, of_folder


def write_card(folder: Path, run: Path) -> None:
    """Write README.md beside what was trained, in place of the empty one that PEFT writes.

    A README.md that is somebody else's stays as it is.

    Args:
        folder: holds an adapter or a whole model, with its prompt.json: the run's own, or a checkpoint's.
        run: the run's folder, whose files the card tells.

    Raises:
        OSError: it cannot be written.
    """
    about, path = of_folder(folder, run, __version__), folder / artifacts.CARD
    if about is None:
        return
    if not may_write(path):
        say(f"{path} was not written by this program; it is left unchanged")
        return
    with naming(path):
        path.write_text(card(about), encoding="utf-8")

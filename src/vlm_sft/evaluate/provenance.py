"""What a folder of predictions came from, so that no other model's are taken for its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common import artifacts
from vlm_sft.common.errors import EvaluationError, quoted
from vlm_sft.common.weights import weights_fingerprint

if TYPE_CHECKING:
    from vlm_sft.model.load import Base

PART = "predictions.rank{}.jsonl"


def identity_of(base: Base, adapter: Path | None) -> dict[str, Any]:
    """Describe what answers: base model, adapter and prompt.

    Args:
        base: the base model; its weights count by their fingerprint.
        adapter: folder of the adapter; its weights count by their content.
    """
    weights = hashlib.sha256((adapter / artifacts.ADAPTER_WEIGHTS).read_bytes()).hexdigest() if adapter else None
    return {
        "base_model": base.name,
        "base_weights": weights_fingerprint(base.path),
        "load_in_4bit": base.load_in_4bit,
        "adapter_sha256": weights,
        "prompt": base.prompt.to_dict(),
    }


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The predictions of a folder by id: a finished file, and the parts of ranks, of whatever number of ranks."""
    rows: dict[str, dict[str, Any]] = {}
    for path in [folder / artifacts.PREDICTIONS, *part_files(folder)]:
        if path.is_file():
            rows.update((row["id"], row) for row in artifacts.read_jsonl(path))
    return rows


def part_files(folder: Path) -> list[Path]:
    """What the ranks of an unfinished evaluation wrote."""
    return sorted(folder.glob(PART.format("*")))


def claim(folder: Path, identity: dict[str, Any], replace: bool) -> None:
    """Make a folder ready for the predictions of a model; its own earlier predictions stay.

    Args:
        folder: of one benchmark.
        identity: from `identity_of`, with the limit of an answer.
        replace: remove the predictions of another model instead of refusing.

    Raises:
        EvaluationError: the folder holds predictions of another model, prompt or limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / artifacts.IDENTITY
    earlier = artifacts.read_json(path) if path.is_file() else {}
    files = [file for file in (folder / artifacts.PREDICTIONS, folder / artifacts.RESULTS) if file.is_file()]
    files += part_files(folder)
    if files and earlier != identity:
        if not replace:
            changed = [key for key in identity if earlier.get(key) != identity[key]]
            differences = ", ".join(
                f"{key} {quoted(earlier.get(key), 200)} instead of {quoted(identity[key], 200)}" for key in changed
            )
            raise EvaluationError(
                f"{folder} holds predictions made with {differences}", "choose another --output_dir, or remove this one"
            )
        for file in files:
            file.unlink()
    artifacts.write_json(path, identity)


def mend_parts(folder: Path) -> None:
    """Cut lines that a kill tore off the ends of files, so that the next line does not grow onto them."""
    for part in part_files(folder):
        data = part.read_bytes()
        if data and not data.endswith(b"\n"):
            with part.open("r+b") as stream:
                stream.truncate(data.rfind(b"\n") + 1)

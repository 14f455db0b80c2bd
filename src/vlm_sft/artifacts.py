"""The name and schema of every file a run writes, and atomic writes. Imports the standard library only.

Train, evaluate and report meet in these files; docs/ARTIFACTS.md describes each one for users.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm_sft.errors import RunError

RUN = "run.json"  # what ran, where, with which versions; its status; seconds and bytes
RECIPE = "recipe.json"  # the resolved recipe with every default
DATA = "data.json"  # counts of samples, images, tokens; what was left out and why
LEFT_OUT = "left_out.jsonl"  # one line a sample that was left out: id, reason
METRICS = "metrics.jsonl"  # one line a log event of the training
TRACKERS = "trackers.json"  # where TensorBoard, W&B, MLflow and Trackio have this run, for a resume to go on with it
TRACKER_FOLDERS = ("runs", "wandb", "mlruns", "trackio")  # what they write where they are not sent elsewhere
ANOMALIES = "anomalies.jsonl"  # one line an event of the training that should not happen; not there when none did
RESULTS = "results.json"  # the table: benchmark, n, base, tuned, difference
PICTURES = "pictures.json"  # which pictures an evaluation did not keep
PREDICTIONS = "predictions.jsonl"  # one line an evaluated question
IDENTITY = "identity.json"  # what made the predictions beside it: model, adapter, prompt, limit of an answer
VALIDATION_FOLDER = "validation"  # validation/step-<N>/<benchmark>/…: the benchmarks' questions asked during training
GUARD = "guard.json"  # what each evaluated step of a guarded training lost elsewhere, and which steps qualify
PROMPT = "prompt.json"  # prompt template and image settings: they travel with a base or an adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PARTIAL = ".adapter.partial"  # the adapter while it is written
MANIFEST = "manifest.json"  # of a checkpoint, and of the adapter: every file's size and SHA-256, what it belongs to
MANIFEST_CHECKSUM = "manifest.sha256"  # the checksum of manifest.json, as sha256sum writes it
VERIFY = "verify.json"  # what vlm-sft verify found: is a resume exact, which checkpoints are damaged
LOCK = ".lock"  # held by the run that writes the folder; says which one
FULL_WEIGHTS = "model.safetensors"  # a whole model, where all weights were trained; large ones are in shards
FULL_WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_FILES = (  # patterns of what a folder of a whole model holds besides ours
    "model*.safetensors", FULL_WEIGHTS_INDEX, "config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)
IMPORT = "import.json"  # what `vlm-sft data import` read, wrote and left out
REPEATS = "repeats.jsonl"  # one line a question that `vlm-sft data check` found asked before of the same image
CHANGED = "changed.jsonl"  # one line a question that is not exactly as it was in another program's layout
EXCHANGE = "export_data.json"  # the same of `vlm-sft data export`
EXPORT = "export.json"  # what `vlm-sft export` made, of what, and how it was verified
CARD = "README.md"  # the model card of an export, of a run's adapter and of its checkpoints
REPORT = "report.html"
COMPARE_JSON = "compare.json"  # the paired comparison of runs: differences, tests, verdicts, items that changed
COMPARE_MARKDOWN = "compare.md"  # the same as a table to read
EVALUATION_FOLDER = "evaluation"  # evaluation/base/<benchmark>/…, evaluation/tuned/<benchmark>/…


def holds_full_model(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any((folder / name).is_file() for name in (FULL_WEIGHTS, FULL_WEIGHTS_INDEX))


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write aside, flush to the disk, rename.

    Raises:
        OSError: the folder is missing or full, or cannot be written; an older file at `path` is left as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of one.

    Args:
        path: the file; its folder is made when missing.
        text: written as UTF-8.

    Returns:
        The path.

    Raises:
        RunError: when the folder or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, text.encode("utf-8"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "choose a folder that you may write to") from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    return write_text_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        RunError: the file is missing, unreadable or not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist", "pass a folder that a finished command wrote") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}", "the file is damaged; write it again") from error


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line, atomically."""
    return write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file that this program wrote; a last, torn line is passed over."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            what = f"{path} line {number} is not JSON: {error}"
            raise RunError(what, "the file is damaged; write it again") from error

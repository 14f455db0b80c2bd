"""The name and schema of every file a run writes, atomic writes, and the one reader of JSON.

Train, evaluate and report meet in these files; docs/ARTIFACTS.md describes each one for users. What is read may come
from anyone: a reader bounds its size and depth, and takes nothing that two programs could read in two ways.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import HostLostError, RunError, VlmSftError, plain

RUN = "run.json"  # what ran, where, with which versions; its status; seconds and bytes
RECIPE = "recipe.json"  # the resolved recipe with every default
DATA = "data.json"  # counts of samples, images, tokens; what was left out and why
OVERSIZED = "oversized.jsonl"  # one line a sample that is longer than a limit: id, part, tokens, limit, done
LEFT_OUT = "left_out.jsonl"  # one line a sample that was left out: id, reason
LOG = "log.txt"  # what the training told, line by line, with what the terminal folds
METRICS = "metrics.jsonl"  # one line a log event of the training
TRACKERS = "trackers.json"  # where TensorBoard, W&B, MLflow and Trackio have this run, for a resume to go on with it
TRACKER_FOLDERS = ("runs", "wandb", "mlruns", "trackio")  # what they write where they are not sent elsewhere
ANOMALIES = "anomalies.jsonl"  # one line an event of the training that should not happen; not there when none did
RESULTS = "results.json"  # the table: benchmark, n, base, tuned, difference
PICTURES = "pictures.json"  # which pictures an evaluation did not keep
PREDICTIONS = "predictions.jsonl"  # one line an evaluated question
JUDGE = "judge.jsonl"  # the verdicts of a judge on the predictions beside it, so that none is asked for twice
IDENTITY = "identity.json"  # what made the predictions beside it: model, adapter, prompt, limit of an answer
VALIDATION_FOLDER = "validation"  # validation/step-<N>/<benchmark>/…: the benchmarks' questions asked during training
GUARD = "guard.json"  # what each evaluated step of a guarded training lost elsewhere, and which steps qualify
PROMPT = "prompt.json"  # prompt template and image settings: they travel with a base or an adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PARTIAL = ".adapter.partial"  # the adapter while it is written
MERGED_BASE = "merged_base"  # the model that a second stage began with: a base with an adapter merged into it
ORIGIN = "origin.json"  # in it: which adapter on which base
MANIFEST = "manifest.json"  # of a checkpoint, and of the adapter: every file's size and SHA-256, what it belongs to
MANIFEST_CHECKSUM = "manifest.sha256"  # the checksum of manifest.json, as sha256sum writes it
VERIFY = "verify.json"  # what vlm-sft verify found: is a resume exact, which checkpoints are damaged
LOCK = ".lock"  # held by the run that writes the folder; says which one
FULL_WEIGHTS = "model.safetensors"  # a whole model, where all weights were trained; large ones are in shards
FULL_WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_FILES = (  # patterns of what a folder of a whole model holds besides ours
    "model*.safetensors",
    FULL_WEIGHTS_INDEX,
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
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
SWEEP = "sweep.json"  # the trials of a sweep, what they came to, and which setting to take
SWEEP_PAGE = "sweep.html"  # the same with figures
TRIALS_FOLDER = "trials"  # in a sweep's folder: one run folder a trial, its log beside it
ROWS_FOLDER = "rows"  # rows that a caller from Python held in memory, with their images
EVALUATION_FOLDER = "evaluation"  # evaluation/base/<benchmark>/…, evaluation/tuned/<benchmark>/…


# What the umask leaves of a new file: libraries that write aside make theirs readable for their owner only.
FILE_MODE = 0o666 & ~(_umask := os.umask(0o077))
os.umask(_umask)
MAX_JSON_BYTES = 256 * 1024**2  # of one JSON file; the largest that we write list all that changed between two runs
MAX_JSON_DEPTH = 100  # of lists and objects in each other
# How files take the bytes of a name that are no UTF-8 (surrogates in Python): as \\udcXX, which JSON reads back.
UNENCODABLE = "backslashreplace"


def writable(text: str) -> str:
    """A text that any file and stream of UTF-8 takes, see `UNENCODABLE`."""
    return text.encode("utf-8", UNENCODABLE).decode("utf-8")


def holds_full_model(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any((folder / name).is_file() for name in (FULL_WEIGHTS, FULL_WEIGHTS_INDEX))


class OutputFolder:
    """A command's output folder, which is as it was before when the command fails before it has done anything.

    Args:
        folder: the folder, there or not.
        made: patterns of what the command makes in it that is worth nothing without its work. Nothing else is removed,
            and nothing that was there before, or that the error's text names.
    """

    def __init__(self, folder: Path, *made: str) -> None:
        self.folder = folder
        self._made = made
        self._before = set(self._found())
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]

    def _found(self) -> list[Path]:
        return [path for pattern in self._made for path in self.folder.glob(pattern)]

    @contextmanager
    def or_nothing(self, worked: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Put the folder back when the block ends in a user's mistake.

        Args:
            worked: asked then: whether there is something in the folder that must stay.
        """
        try:
            yield
        except VlmSftError as error:
            if not isinstance(error, HostLostError) and not worked():
                self._put_back(str(error))
            raise

    def _put_back(self, told: str) -> None:
        for path in sorted(set(self._found()) - self._before, reverse=True):
            if plain(str(path)) in told:
                continue
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                if path.parent != self.folder:
                    path.parent.rmdir()
        with suppress(OSError):  # what holds something stays
            for folder in self._missing:
                folder.rmdir()


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet that opens a CSV would compute a cell instead of showing its text."""
    if cell[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def in_markdown(text: str) -> str:
    """A text from outside on one line of Markdown, where it opens no column, element, code or link of its own."""
    line = " ".join(text.split()).replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")
    return re.sub(r"<(?=[A-Za-z/!?])", r"\<", line)


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
        os.chmod(temporary, FILE_MODE)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of one.

    Args:
        path: the file; its folder is made when missing.
        text: written as UTF-8, see `UNENCODABLE`.

    Returns:
        The path.

    Raises:
        RunError: when the folder or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, text.encode("utf-8", UNENCODABLE))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "choose a folder that you may write to") from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    return write_text_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str, strict: bool = True, unique: bool = False) -> Any:
    """Parse one JSON text that may come from anyone.

    Args:
        text: the text.
        strict: refuse a key that comes twice and numbers that are not finite; other programs write either.
        unique: refuse a key that comes twice in any case: of two answers none is known to be the right one.

    Raises:
        ValueError: it is not JSON, not as strict as asked, or nested deeper than `MAX_JSON_DEPTH`.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique} if strict or unique else {}
    if strict:
        hooks |= {"parse_float": _finite, "parse_constant": _finite}
    try:
        value = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        _check_depth(value)
    return value


_TOO_DEEP = f"it is nested deeper than {MAX_JSON_DEPTH} levels"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} comes twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _members(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for one in level for item in _members(one)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(_TOO_DEEP)


def read_json(path: str | Path, strict: bool = True) -> dict[str, Any]:
    """Read one JSON file that holds an object; it may come from anyone.

    Args:
        path: the file.
        strict: as of `parse_json`.

    Raises:
        RunError: the file is missing, unreadable, larger than `MAX_JSON_BYTES`, or no JSON object (see `parse_json`);
            the message names it.
    """
    path = Path(path)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a folder, or a pipe that would never end
            raise ValueError("it is no file")
        if state.st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {state.st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
        value = parse_json(path.read_text(encoding="utf-8-sig"), strict)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {_KINDS.get(type(value), 'number')}, not an object")
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist", "pass a folder that a finished command wrote") from error
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"cannot read {path}: {reason}", "the file is damaged; write it or copy it again") from error
    return value


_KINDS = {list: "list", str: "text", type(None): "null", bool: "true or false"}


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
            yield parse_json(line)
        except ValueError as error:
            if number == len(lines):
                return
            what = f"{path} line {number} is not JSON: {error}"
            raise RunError(what, "the file is damaged; write it again") from error


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(path: Path | None) -> int:
    """The optimizer step of a checkpoint folder; 0 for None."""
    match = _CHECKPOINT.fullmatch(path.name) if path else None
    return int(match.group(1)) if match else 0

"""Whether a folder holds a whole model, before anything long starts.

Nothing is loaded: small JSON files are read, and of weights their headers.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from vlm_sft.common.artifacts import ADAPTER_CONFIG, FULL_WEIGHTS, FULL_WEIGHTS_INDEX, parse_json, read_json, writable
from vlm_sft.common.errors import ModelError, RunError

_SETTINGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    FULL_WEIGHTS_INDEX,
)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MOST_SHOWN = 4
_LARGEST_HEADER = 100_000_000  # bytes; what safetensors itself takes


def require_model(folder: Path, name: str) -> None:
    """Make sure that a folder holds a whole model that can be opened: settings, processor, tokenizer, weights.

    Args:
        folder: the folder.
        name: what the user calls it.

    Raises:
        ModelError: it holds an adapter, something is missing or damaged (all of it is named), or its path cannot be
            opened.
    """
    if (folder / ADAPTER_CONFIG).exists():
        place = shlex.quote(name)
        raise ModelError(
            f"--base_model {name}: that is an adapter, not a base model",
            f"pass it as --adapter {place} beside its own --base_model, or make a model of both first: vlm-sft export "
            f"--adapter {place} --merge --output_dir {shlex.quote(name.rstrip('/') + '-merged')}",
        )
    require_utf8(folder, "--base_model")
    if not (folder / "config.json").exists():
        raise ModelError(f"--base_model {name}: the folder has no config.json", "pass a Hugging Face model folder")
    problems = [*_settings_problems(folder), *_lacking(folder), *_weights_problems(folder)]
    if problems:
        more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        raise ModelError(
            f"--base_model {name}: the folder is not a complete model: {'; '.join(problems[:_MOST_SHOWN])}{more}",
            "copy or download the complete model again, as safetensors",
        )


def require_utf8(folder: Path, flag: str) -> None:
    """Refuse a folder that the libraries of weights and tokenizers cannot open.

    Raises:
        ModelError: its path holds bytes that are not UTF-8, or that the locale does not read as UTF-8.
    """
    if writable(str(folder)) != str(folder):
        if (locale := sys.getfilesystemencoding()) != "utf-8":
            raise ModelError(
                f"{flag} {writable(str(folder))}: the locale has Python read names of files as {locale}",
                "set PYTHONUTF8=1, or LC_ALL=C.UTF-8, and start again",
            )
        raise ModelError(
            f"{flag} {writable(str(folder))}: the path is not valid UTF-8, and the libraries of weights and "
            "tokenizers cannot open it",
            "take another name",
        )


def _settings_problems(folder: Path) -> list[str]:
    """Small files that are there and cannot be read."""
    problems = []
    for name in _SETTINGS:
        if (folder / name).exists():
            try:
                read_json(folder / name, strict=False)
            except RunError as error:
                problems.append(error.what.replace(str(folder / name), name))
    return problems


def _lacking(folder: Path) -> list[str]:
    """Parts that every model has in one of several files."""
    parts = {"its image processor": _PROCESSORS, "its tokenizer": _TOKENIZERS}
    return [
        f"{part} is missing ({' or '.join(names[:2])})"
        for part, names in parts.items()
        if not any((folder / name).is_file() for name in names)
    ]


def _weights_problems(folder: Path) -> list[str]:
    """What is wrong with the weights, one sentence a file."""
    if (folder / FULL_WEIGHTS_INDEX).is_file():
        try:
            shards = sorted({str(name) for name in read_json(folder / FULL_WEIGHTS_INDEX)["weight_map"].values()})
        except RunError:
            return []  # reported with the other settings
        except (KeyError, AttributeError):
            return [f"{FULL_WEIGHTS_INDEX} has no weight_map"]
        if strange := [name for name in shards if Path(name).name != name]:
            return [f"{FULL_WEIGHTS_INDEX} names a file of another folder: {strange[0][:80]}"]
    elif (folder / FULL_WEIGHTS).exists():
        shards = [FULL_WEIGHTS]
    elif pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return [f"its weights are pickles ({pickles[0]}), which could run code and are not opened"]
    else:
        return [f"its weights are missing ({FULL_WEIGHTS}, or {FULL_WEIGHTS_INDEX} with the files that it names)"]
    return [f"{name} {problem}" for name in shards if (problem := weights_problem(folder / name))]


def weights_problem(path: Path) -> str:
    """What is wrong with a safetensors file, in words that follow its name; "" when its header and size are sound."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                return "is a pointer of Git LFS; `git lfs pull` fetches the weights"
            if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
                return f"is cut off or no safetensors file ({size:,} bytes)"
            header = parse_json(stream.read(length).decode("utf-8"))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "has a damaged header"
    return "" if size == expected else f"has {size:,} bytes instead of {expected:,}"

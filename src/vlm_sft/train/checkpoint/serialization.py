"""Nested state of optimizer, schedule and random numbers: safetensors with JSON, no pickles.

Tensors and arrays are stored as they are; everything around them is JSON in the file's metadata. A value comes back
with its exact bits and its exact types, tuples and whole-number keys included.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm_sft.common.artifacts import parse_json

_TREE = "state"


def save_state(path: Path, value: Any) -> None:
    """Write a nested value.

    Args:
        path: the file, `….safetensors`.
        value: dicts, lists, tuples, numbers, texts, booleans, None, tensors and numpy arrays, in any nesting.

    Raises:
        TypeError: the value holds something else.
        OSError: the file cannot be written; the message names it.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(value, tensors)
    try:
        save_file(tensors, path, metadata={_TREE: json.dumps(tree, allow_nan=False)})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {str(error).strip().splitlines()[0]}") from error


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote; tensors are on the CPU."""
    with safe_open(path, framework="pt") as stream:
        return _decode(parse_json(stream.metadata()[_TREE]), stream)


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON tree of a value; its tensors go into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        flat = torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return {"array": _encode(flat, tensors)["tensor"], "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    raise TypeError(f"state of type {type(value).__name__} cannot be kept in a checkpoint")


def _decode(tree: Any, stream: Any) -> Any:
    """The value of a JSON tree."""
    if isinstance(tree, list):
        return [_decode(item, stream) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return stream.get_tensor(tree["tensor"])
    if "array" in tree:
        flat = stream.get_tensor(tree["array"]).numpy()
        return flat.view(np.dtype(tree["dtype"])).reshape(tree["shape"]).copy()
    if "float" in tree:
        return float(tree["float"])
    if "tuple" in tree:
        return tuple(_decode(item, stream) for item in tree["tuple"])
    return {_decode(key, stream): _decode(item, stream) for key, item in tree["dict"]}


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them; that of a GPU only where there is one."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

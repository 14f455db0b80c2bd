"""Which weights a model has, told without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PARTS, _PART_BYTES = 64, 4096


def model_folder(model: str) -> Path | None:
    """The folder of a model on this disk; None where there is none.

    Args:
        model: its folder, or its Hub id.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def weights_fingerprint(model: str) -> str:
    """A hash that tells the weights of a model from others; "" where none are on this disk.

    Names, sizes and 64 evenly spaced parts of each file: weights that were trained differ nearly everywhere.

    Args:
        model: its folder, or its Hub id.

    Returns:
        32 hex digits of SHA-256.
    """
    folder = model_folder(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode("utf-8", "surrogatepass"))
        with path.open("rb") as stream:
            for part in range(_PARTS):
                stream.seek(part * size // _PARTS)
                digest.update(stream.read(_PART_BYTES))
    return digest.hexdigest()[:32] if files else ""

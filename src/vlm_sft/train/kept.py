"""What the cache holds already of the images of a run, read from its indexes alone. Imports data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_sft.artifacts import read_json
from vlm_sft.data.cache import image_settings, record_key
from vlm_sft.data.cache_folder import ENTRY, FEATURES, IMAGES, settings_key
from vlm_sft.data.encode import Encoder
from vlm_sft.data.sample import Sample
from vlm_sft.errors import RunError


class Kept:
    """What the cache holds of an encoder's images, read from the indexes alone.

    Args:
        root: the cache folder.
        encoder: whose images.
        base, path: name of the base model, and its folder (or Hub id).
    """

    def __init__(self, root: Path, encoder: Encoder, base: str, path: str) -> None:
        self.settings = image_settings(encoder)
        self.root = root
        self._pixels = _keys(root / IMAGES / settings_key(self.settings))
        self._features = self._feature_keys(base, max(_times(Path(path)), default=0.0))

    def _feature_keys(self, base: str, changed: float) -> set[str]:
        """Images that have features, as far as one can know before the weights of the tower are read.

        Args:
            base: whose features.
            changed: when its weights were written, in seconds; features that are older are of other weights.
        """
        found: set[str] = set()
        for marker in (self.root / FEATURES).glob(f"*/{ENTRY}"):
            try:
                entry = read_json(marker)
                settings, named = entry["settings"], entry["what"]
            except (RunError, KeyError, TypeError):
                continue
            own = {name: value for name, value in self.settings.items() if name != "versions"}
            same = settings_key(own) == settings_key({name: settings.get(name) for name in own})  # as JSON: () is []
            if same and named == base and max(_times(marker.parent), default=0.0) >= changed:
                found |= _keys(marker.parent)
        return found

    def without_images(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those whose processed image is not there."""
        return [sample for sample in samples if record_key(sample.image_key) not in self._pixels]

    def without_features(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those whose vision features are not there."""
        return [sample for sample in samples if record_key(sample.image_key) not in self._features]


def _times(folder: Path) -> list[float]:
    """When the safetensors of a folder were written, in seconds."""
    return [path.stat().st_mtime for path in folder.glob("*.safetensors")]


def _keys(folder: Path) -> set[str]:
    """Keys of all records of a cache entry."""
    found: set[str] = set()
    for index in folder.glob("*.json"):
        try:
            found |= set(read_json(index).get("records", ())) if index.name != ENTRY else set()
        except (RunError, AttributeError):
            continue
    return found

"""Which images of a run the cache holds already, read from its indexes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.errors import RunError
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.data.cache.directory import ENTRY, FEATURES, IMAGES, entry_weights, settings_key
from vlm_sft.data.cache.encoded import image_settings, record_key
from vlm_sft.data.cache.image_tensors import BEFORE_PROJECTOR, KEPT
from vlm_sft.data.encode import Encoder
from vlm_sft.data.sample import Sample


class CachedImages:
    """Which images of an encoder the cache holds, as processed images and as vision features.

    Args:
        root: the cache folder.
        encoder: whose images.
        base: the base model's folder, or Hub id.
    """

    def __init__(self, root: Path, encoder: Encoder, base: str) -> None:
        self.settings = image_settings(encoder)
        self.root = root
        self._pixels = _keys(root / IMAGES / settings_key(self.settings))
        self._features = self._feature_keys(weights_fingerprint(base))

    def _feature_keys(self, weights: str) -> dict[bool, set[str]]:
        """Images that have features of these weights, behind this image processor; True: inputs of the projector."""
        found: dict[bool, set[str]] = {False: set(), True: set()}
        for marker in (self.root / FEATURES).glob(f"*/{ENTRY}"):
            try:
                entry = read_json(marker)
                settings = entry["settings"]
            except (RunError, KeyError, TypeError):
                continue
            own = {name: value for name, value in self.settings.items() if name != "versions"}
            same = settings_key(own) == settings_key({name: settings.get(name) for name in own})  # as JSON: () is []
            if same and weights in entry_weights(entry):
                found[settings.get(KEPT) == BEFORE_PROJECTOR] |= _keys(marker.parent)
        return found

    def without_images(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those whose processed image is not there."""
        return [sample for sample in samples if record_key(sample.image_key) not in self._pixels]

    def without_features(self, samples: Sequence[Sample], before_projector: bool = False) -> list[Sample]:
        """Those whose vision features are not there, or what goes into the projector."""
        found = self._features[before_projector]
        return [sample for sample in samples if record_key(sample.image_key) not in found]


def _keys(folder: Path) -> set[str]:
    """Keys of all records of a cache entry."""
    found: set[str] = set()
    for index in folder.glob("*.json"):
        try:
            found |= set(read_json(index).get("records", ())) if index.name != ENTRY else set()
        except (RunError, AttributeError):
            continue
    return found

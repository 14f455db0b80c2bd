"""The images of a pack as arguments of a model: their features where these are kept, else their pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlm_sft.common.errors import DataError
from vlm_sft.data.cache.feature_names import PREFIX, features_of, is_pixels
from vlm_sft.data.cache.store import Record
from vlm_sft.data.collate import PackedBatch
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.projector_inputs import INPUT, projected
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.vision_features import (
    as_weights,
    encode_images,
    joined_features,
    joined_tensors,
    projector_modules,
    tower_modules,
    whole_tower,
)


def image_inputs(model: AnyModel, batch: PackedBatch) -> dict[str, Any]:
    """The images of a pack as arguments of the model: its features where the pack has them, else its pixels.

    Args:
        model: computes the features of images whose kept ones turned out to be damaged.
        batch: the pack.
    """
    images = [image for image in batch.tensors if image]  # a text row has none
    if not images:
        return {}
    features = [features_of(image) for image in images]
    if not any(features):
        return as_weights(model, joined_tensors(images))
    features = [found or _features_now(model, image) for found, image in zip(features, images, strict=True)]
    if any(name.startswith(INPUT) for name in features[0]):
        features = projected(projector_modules(model), features)
    # Where the model finds the positions itself it needs the sizes of the images too.
    sizes = [
        {name: value for name, value in image.items() if not (name.startswith(PREFIX) or is_pixels(name))}
        for image in images
    ]
    return {"mm_encoder_outputs": {"image": joined_features(features)}, **joined_tensors(sizes)}


def _features_now(model: AnyModel, image: Mapping[str, torch.Tensor]) -> Record:
    """The features of one image, from its pixels.

    Raises:
        DataError: the tower is divided, and the other ranks do not know of this image.
    """
    if is_partitioned(*(parameter for tower in tower_modules(model).values() for parameter in tower.parameters())):
        raise DataError("cached vision features are damaged", "start again with --resume auto: they are computed again")
    device = next(iter(image.values())).device
    with whole_tower(model, str(device)):
        (found,) = encode_images(model, [image])
    return {name: value.to(device) for name, value in found.items()}

"""The images of a batch of separate sequences: several are about one image, whose features are computed once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from vlm_sft.data.cache.image_tensors import features_of, is_pixels
from vlm_sft.data.collate import PackedBatch
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.vision_features import (
    as_weights,
    features_by_image,
    image_inputs,
    inner_model,
    joined_features,
    joined_tensors,
    tower_output,
    unwrap,
)

# Tensors of a processor with a row for each image, or each part of one that the tower gives an item for.
_ONE_AN_IMAGE = ("image_grid_thw", "image_grid_hw", "image_sizes", "image_grids", "pixel_values")
_BY_IMAGE = ("last_hidden_state", "pooler_output", "deepstack_features")  # of a tower's output


def row_images(model: AnyModel, batch: PackedBatch, rows: Sequence[int]) -> dict[str, Any]:
    """The images of some rows as arguments of the model.

    Args:
        model: computes features of images that several rows are about; gradients reach its tower.
        batch: the pack; every image of it has a row, and so has every text row.
        rows: which image each row is about, in order.
    """
    images = [place for place, image in enumerate(batch.tensors) if image]
    batch = replace(batch, tensors=[batch.tensors[place] for place in images])
    rows = [images.index(row) for row in rows if row in images]
    if len(rows) == len(batch.tensors):
        return image_inputs(model, batch)
    repeated = replace(batch, tensors=[batch.tensors[row] for row in rows])
    if any(features_of(image) for image in batch.tensors) or not _takes_features(model):
        return image_inputs(model, repeated)
    # Where the model finds the positions itself it needs the sizes of the images too.
    sizes = [{name: value for name, value in image.items() if not is_pixels(name)} for image in repeated.tensors]
    return {"mm_encoder_outputs": {"image": _encoded_once(model, batch.tensors, rows)}, **joined_tensors(sizes)}


def _takes_features(model: AnyModel) -> bool:
    """Whether the tower can be run apart; divided weights are gathered in the model's own forward pass only."""
    base = unwrap(model)
    accepted = "mm_encoder_outputs" in inspect.signature(base.forward).parameters
    return accepted and hasattr(inner_model(model), "get_image_features") and not is_partitioned(*base.parameters())


def _encoded_once(model: AnyModel, images: Sequence[Mapping[str, torch.Tensor]], rows: Sequence[int]) -> Any:
    """What the tower puts out, as if it had seen an image for each row; it sees every image once."""
    whole = as_weights(model, joined_tensors(images))
    output = units = None
    # Some images lack a tensor: small ones have no crops (Step 3.7, Unlimited-OCR).
    if all(len(whole[name]) == sum(len(image[name]) for image in images if name in image) for name in whole):
        output = tower_output(model, whole)
        units = _units(images, output)
    if output is None or units is None:  # it is not known what belongs to which image
        records = [
            features_by_image(tower_output(model, as_weights(model, joined_tensors([image]))), [image])[0]
            for image in images
        ]
        return joined_features([records[row] for row in rows])
    firsts = list(accumulate(units, initial=0))
    places = [place for row in rows for place in range(firsts[row], firsts[row + 1])]
    for name in _BY_IMAGE:
        if getattr(output, name, None) is not None:
            output[name] = _at_places(output[name], places, firsts[-1])
    return output


def _units(images: Sequence[Mapping[str, torch.Tensor]], output: Any) -> list[int] | None:
    """How many of the items that the tower put out belong to each image; None where that is not clear."""
    found_in = getattr(output, "pooler_output", None)
    if found_in is None:  # Granite 4 Vision has (layer, features) for each of several layers, Llama 4 hidden states
        deep = getattr(output, "deepstack_features", None)
        found_in = deep[0][1] if deep else output.last_hidden_state
    count = len(found_in)
    for name in _ONE_AN_IMAGE:
        if all(name in image for image in images):
            found = [len(image[name]) for image in images]
            if sum(found) == count:
                return found
    return None


def _at_places(value: Any, places: list[int], count: int) -> Any:
    """Some of the `count` items of a part of a tower's output, also of parts that are one such list a layer."""
    if isinstance(value, torch.Tensor):
        return value[places] if len(value) == count else value
    if not isinstance(value, list | tuple):
        return value
    if all(isinstance(item, torch.Tensor) for item in value):
        return [value[place] for place in places] if len(value) == count else value
    return type(value)(_at_places(item, places, count) for item in value)

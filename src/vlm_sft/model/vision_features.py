"""Frozen vision features: how they come out of the vision tower and go into the model.

While nothing in the vision tower is trained, its output for an image never changes. transformers takes it as
`mm_encoder_outputs`, where the tower's own output would enter, so a pack with features runs no tower. What goes into
a projector that is trained behind a frozen tower never changes either (`projector_inputs.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_sft.common.errors import DataError
from vlm_sft.data.cache.image_tensors import FEATURE_PREFIX, features_of, is_pixels, unpack_pixels
from vlm_sft.data.cache.store import Record
from vlm_sft.data.collate import PackedBatch
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.matmul import mixed_precision, stream_dtype
from vlm_sft.model.families import family_of
from vlm_sft.model.forward_patch import evaluating
from vlm_sft.model.projector_inputs import INPUT, called_modules, marked, projected, row_numbers
from vlm_sft.model.protocols import AnyModel, VisionLanguageModel

POOLED, DEEPSTACK, INJECTED, INDICATORS = "pooled", "deepstack", "injected", "indicators"
_LISTS = ("list[int]", "list[list[int]]")
_POOLED_PATCHES = "image_token_pooling"  # Molmo 2: which patches of which crop make an image token


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """What a model takes for the output of its vision tower.

    Qwen3-VL adds features of deeper layers, one list a layer; Granite 4 Vision has (language layer, features) instead.
    Ovis 2 adds the embeddings of the tokens around tiles, the same for every image.
    """

    deepstack_features: list[Any] | None = None
    visual_indicator_features: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None  # Granite Docling: of a loss that answers have no part in


class TowerCounter:
    """Counts the calls of a model's vision tower and the images in them.

    Args:
        model: the model; wrapping it later does not matter.
    """

    def __init__(self, model: AnyModel) -> None:
        self.calls = 0
        self.images = 0
        tower = next(iter(tower_modules(model).values()), None)
        self._handle = tower.register_forward_pre_hook(self._count, with_kwargs=True) if tower is not None else None

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = (kwargs[name] for name in ("grid_thw", "image_grid_hw", "pixel_values") if name in kwargs)
        sized = next(named, args[0] if args else None)
        self.calls += 1
        self.images += len(sized) if isinstance(sized, torch.Tensor) and sized.dim() else 0

    def close(self) -> None:
        """Stop counting."""
        if self._handle is not None:
            self._handle.remove()


def unwrap(model: AnyModel) -> VisionLanguageModel:
    """The Hugging Face model inside wrappers of DDP, DeepSpeed and PEFT."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def inner_model(model: AnyModel) -> Any:
    """What holds the vision tower and the language model: everything but the head, or the model itself (Llama 4)."""
    base = unwrap(model)
    return getattr(base, "model", base)


def decoder_of(model: AnyModel) -> Any:
    """The language model without its head, which Llama 4 takes for a part of it."""
    decoder = unwrap(model).get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def head_of(model: AnyModel) -> Any:
    """The projection to the vocabulary, which Nemotron-H Omni takes for a part of its language model; None without."""
    base = unwrap(model)
    head = base.get_output_embeddings()
    return base.get_decoder().get_output_embeddings() if head is None else head


def tower_modules(model: AnyModel) -> dict[str, torch.nn.Module]:
    """The modules that turn pixels into image embeddings: all of the inner model's children but the language model."""
    inner = inner_model(model)
    decoder = unwrap(model).get_decoder()
    return {
        name: module
        for name, module in inner.named_children()
        if all(part is not decoder for part in module.modules()) and any(True for _ in module.parameters())
    }


def start_training(model: AnyModel) -> None:
    """Switch training mode on, but not in what is frozen of the vision tower.

    Its dropout (Granite 4 Vision's projector, Qianfan-OCR's stochastic depth) would make other features of every look
    at an image, and others than those that are kept.
    """
    model.train()
    for tower in tower_modules(model).values():
        _settle_frozen(tower)


def _settle_frozen(part: torch.nn.Module) -> None:
    """Evaluation mode for modules that have weights of which none is trained."""
    trained = [parameter.requires_grad for parameter in part.parameters()]
    if any(trained):
        for child in part.children():
            _settle_frozen(child)
    elif trained:
        part.eval()


def loose_parameters(model: AnyModel) -> dict[str, torch.nn.Parameter]:
    """Weights that belong to image features and to no module (LLaVA-OneVision: the end of a row of patches)."""
    return dict(inner_model(model).named_parameters(recurse=False))


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
        {name: value for name, value in image.items() if not (name.startswith(FEATURE_PREFIX) or is_pixels(name))}
        for image in images
    ]
    return {"mm_encoder_outputs": {"image": joined_features(features)}, **joined_tensors(sizes)}


def as_weights(model: AnyModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor made, in the format of the weights where it is bfloat16 (Llama 4's tower does not see to it).

    Counts that the model takes as lists (Unlimited-OCR) are lists.
    """
    base = unwrap(model)
    dtype = base.get_input_embeddings().weight.dtype
    accepted = inspect.signature(base.forward).parameters
    wanted = {name: str(accepted[name].annotation) for name in inputs if name in accepted}

    def taken(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if wanted.get(name, "").startswith(_LISTS) and "Tensor" not in wanted[name]:
            return value.tolist()
        return value.to(dtype) if value.dtype == torch.bfloat16 else value

    return {name: taken(name, value) for name, value in inputs.items()}


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


def joined_tensors(images: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate the processor's tensors of all images as one processor call on all of them would.

    Tiles that nothing counts (Idefics3, PerceptionLM: (1, tiles, 3, h, w)) are joined along the second dimension, the
    patches of MiniCPM-V, (1, 3, height, patches x width), along the last one, all others along the first. Where the
    images differ in another dimension, in the number of their tiles (LLaVA-OneVision) or in their shape (Mistral 3),
    the smaller ones are padded with zeros, which the models cut off by the sizes that they are given. Where
    some images lack a tensor (DeepSeek-OCR 2: the crops of large ones) it is that of the others.
    """
    joined = {}
    for name in dict.fromkeys(name for image in images for name in image):
        holders = [image for image in images if name in image]
        values = [image[name] for image in holders]
        if name == _POOLED_PATCHES:
            values = _counted_on(values, [image.get("pixel_values") for image in images])
        axis = _joined_axis(name, holders[0])
        if axis == 1:  # the pictures of one question may be side by side in front: (pictures, tiles, 3, h, w)
            values = [value.flatten(0, 1)[None] for value in values]
        joined[name] = _padded_cat(values, axis)
    return joined


def _joined_axis(name: str, image: Mapping[str, torch.Tensor]) -> int:
    """Along which dimension a tensor of an image is joined with that of another."""
    if not is_pixels(name):
        return 0
    if "target_sizes" in image:
        return 3
    mask = image.get("pixel_attention_mask")
    told = "image_sizes" in image if mask is None else mask.dim() <= 3  # how many of the tiles are no padding
    return 1 if image.get("pixel_values", image[name]).dim() == 5 and image[name].dim() > 3 and not told else 0


def _padded_cat(values: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Concatenate along an axis, after padding all other dimensions with zeros to the largest."""
    largest = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    padded = []
    for value in values:
        gaps = [0 if dim == axis else largest[dim] - size for dim, size in enumerate(value.shape)]
        padded.append(F.pad(value, [side for gap in reversed(gaps) for side in (0, gap)]) if any(gaps) else value)
    return torch.cat(padded, dim=axis)


def _counted_on(values: Sequence[torch.Tensor], pixels: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Places of patches, -1 for none, counted over all images of a call instead of each by itself."""
    counted, first = [], 0
    for value, patches in zip(values, pixels, strict=True):
        counted.append(torch.where(value >= 0, value + first, value))
        first += 0 if patches is None else patches.shape[0] * patches.shape[1]  # (crops, patches, …)
    return counted


def joined_features(images: Sequence[Mapping[str, torch.Tensor]]) -> ImageFeatures:
    """Put the features of all images of a pack into the form in which the tower would have returned them."""
    if POOLED in images[0]:
        pooled = torch.cat([image[POOLED] for image in images])
        indicators = images[0].get(INDICATORS)
        return ImageFeatures(last_hidden_state=pooled, pooler_output=pooled, visual_indicator_features=indicators)

    def values(start: str) -> list[torch.Tensor]:
        return [value for image in images for name, value in image.items() if name.startswith(start)]

    def layers(kind: str) -> list[int]:
        return sorted({int(name.split(".")[1]) for name in images[0] if name.startswith(kind)})

    if injected := [(layer, values(f"{INJECTED}.{layer}.")) for layer in layers(INJECTED)]:
        return ImageFeatures(deepstack_features=injected)
    deep = [values(f"{DEEPSTACK}.{layer}.") for layer in layers(DEEPSTACK)]
    return ImageFeatures(pooler_output=values(POOLED), deepstack_features=deep)  # type: ignore[arg-type]


@torch.no_grad()
def encode_images(model: AnyModel, images: Sequence[Mapping[str, torch.Tensor]]) -> list[Record]:
    """Run the vision tower as the model itself would.

    Args:
        model: the model, its tower on the device where it is to run.
        images: the processor's tensors of each image, packed or not.

    Returns:
        For each image its features in the language model's number format, or inputs of a trained projector; on the CPU.

    Raises:
        ModelError: the trained projector cannot be run apart from the tower.
    """
    base = unwrap(model)
    projectors = trained_projector(model)
    if projectors and len(images) > 1:
        return [record for image in images for record in encode_images(model, [image])]
    weight = next(base.get_input_embeddings().parameters())
    dtype = stream_dtype(weight)
    device = next(next(iter(tower_modules(model).values())).parameters()).device
    whole = joined_tensors([unpack_pixels(image) for image in images])
    arguments = as_weights(model, {name: value.to(device) for name, value in whole.items()})
    with mixed_precision(device, weight.dtype), marked(projectors) as inputs:
        output = tower_output(model, arguments)
    if inputs:
        record = inputs | row_numbers(features_by_image(output, images)[0])
        return [{name: value.cpu().contiguous() for name, value in record.items()}]

    def kept(value: torch.Tensor) -> torch.Tensor:
        return value.to("cpu", dtype).contiguous()

    return [{name: kept(value) for name, value in record.items()} for record in features_by_image(output, images)]


def tower_output(model: AnyModel, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Run the vision tower on the processor's tensors as the model itself would."""
    encode = inner_model(model).get_image_features
    accepted = inspect.signature(encode).parameters
    return encode(**{name: value for name, value in tensors.items() if name in accepted}, return_dict=True)


def features_by_image(output: Any, images: Sequence[Mapping[str, torch.Tensor]]) -> list[Record]:
    """What the tower put out for each image of one call.

    Args:
        output: of the tower.
        images: the processor's tensors of each image; one image where the tower returns one tensor.
    """
    pooled = getattr(output, "pooler_output", None)  # Llama 4 has none: it projects its tower's output itself
    if pooled is None and not getattr(output, "deepstack_features", None):
        pooled = output.last_hidden_state
    if isinstance(pooled, torch.Tensor):
        assert len(images) == 1, "a tower that returns one tensor is called image by image"
        found = {POOLED: pooled, INDICATORS: getattr(output, "visual_indicator_features", None)}
        return [{name: value for name, value in found.items() if value is not None}]
    parts = _parts(output)
    entries = len(next(iter(parts.values())))
    records: list[Record] = []
    first = 0
    for image in images:
        count = len(image["image_grid_thw"]) if "image_grid_thw" in image else entries // len(images)
        records.append({f"{name}.{n}": values[first + n] for n in range(count) for name, values in parts.items()})
        first += count
    return records


def _parts(output: Any) -> dict[str, Sequence[torch.Tensor]]:
    """What a tower returned, by name: for each part one tensor for every image or tile."""
    deep = getattr(output, "deepstack_features", None) or ()
    if output.pooler_output is None:
        return {f"{INJECTED}.{layer}": values for layer, values in deep}
    return {POOLED: output.pooler_output} | {f"{DEEPSTACK}.{layer}": values for layer, values in enumerate(deep)}


def projector_modules(model: AnyModel) -> list[torch.nn.Module]:
    """The modules of a family's projector that are called; [] where it is not known."""
    names = family_of(unwrap(model).config).projector
    return list(called_modules(part for path, part in inner_model(model).named_modules() if path in names))


def trained_projector(model: AnyModel) -> list[torch.nn.Module]:
    """The projector's modules where anything in them is trained; [] elsewhere."""
    projectors = projector_modules(model)
    trained = any(parameter.requires_grad for part in projectors for parameter in part.parameters())
    return projectors if trained else []


@contextmanager
def whole_tower(model: AnyModel, device: str) -> Iterator[None]:
    """The tower on its device, with all of its weights in this process, also where ZeRO-3 has partitioned them."""
    modules = tower_modules(model)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    parameters += loose_parameters(model).values()
    gathered: AbstractContextManager[Any] = nullcontext()
    if is_partitioned(*parameters):
        from deepspeed import zero

        # The embeddings too: their dtype and width are needed.
        gathered = zero.GatheredParameters([*parameters, *unwrap(model).get_input_embeddings().parameters()])
    else:
        for module in modules.values():
            module.to(device)
    with evaluating(model), gathered:
        yield

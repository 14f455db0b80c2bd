"""The tensors of an image as they are stored and travel: pixels as 8-bit codes, or frozen vision features.

A processor's pixel values are 8-bit colours, rescaled and normalised by channel, as float32; Qwen's processors also
repeat every picture for the two frames of a video patch. So 256 values a channel and one byte a pixel say everything:
an eighth of the bytes. What does not fit exactly, bit for bit, is stored as it is.

An image that has features has no pixels. `model/vision_features.py` computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

PIXELS = "pixel_values"
CODES, TABLE, SHAPE = "codes", "table", "shape"
_LEVELS = 256
FEATURE_PREFIX = "features."  # of the names of feature tensors among the tensors of an image
KEPT, BEFORE_PROJECTOR = "kept", "inputs of the projector"  # a setting of entries that hold these instead of features


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How a processor turns a colour c of 0..255 into `(c * rescale - mean) / std`.

    Attributes:
        mean, std: of each channel.
        rescale: factor on the colour.
        frames: how often a picture is repeated within a patch.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    frames: int

    @classmethod
    def of(cls, image_processor: Any) -> PixelFormat:
        """Read the settings of a Hugging Face image processor."""
        normalised = getattr(image_processor, "do_normalize", False)
        mean = getattr(image_processor, "image_mean", None) if normalised else None
        std = getattr(image_processor, "image_std", None) if normalised else None
        rescaled = getattr(image_processor, "do_rescale", False)
        return cls(
            tuple(map(float, mean)) if mean else (0.0,) * 3,
            tuple(map(float, std)) if std else (1.0,) * 3,
            float(image_processor.rescale_factor) if rescaled else 1.0,
            int(getattr(image_processor, "temporal_patch_size", None) or 1),
        )


def _view(shape: torch.Size, channels: int, frames: int) -> tuple[int, int, int, int] | None:
    """The shape (pictures or patches, channels, frames, pixels) of a pixel tensor; None for an unknown layout."""
    total = shape.numel()
    if len(shape) == 2 and shape[1] % (channels * frames) == 0:  # patches: (N, channels * frames * pixels)
        return shape[0], channels, frames, shape[1] // (channels * frames)
    if len(shape) >= 3 and shape[-3] == channels:  # pictures: (…, channels, height, width)
        pixels = shape[-2] * shape[-1]
        return (total // (channels * pixels), channels, 1, pixels) if pixels else None
    return None


def compress(values: torch.Tensor, layout: PixelFormat) -> dict[str, torch.Tensor] | None:
    """Encode pixel values.

    Args:
        values: float32 pixel values in the processor's shape.
        layout: the processor's settings.

    Returns:
        Codes, table and shape for `restore`; None when they would not restore every bit.
    """
    view = _view(values.shape, len(layout.mean), layout.frames)
    if view is None or values.dtype != torch.float32 or not values.numel():
        return None
    frames = values.contiguous().view(view)
    first, bits = frames[:, :, 0], frames.view(torch.int32)
    if any(not torch.equal(bits[:, :, 0], bits[:, :, frame]) for frame in range(1, view[2])):
        return None
    scale = torch.tensor([std / layout.rescale for std in layout.std])[:, None]
    shift = torch.tensor([mean / layout.rescale for mean in layout.mean])[:, None]
    codes = (first * scale).add_(shift).round_().clamp_(0, _LEVELS - 1).to(torch.uint8)
    table = torch.full((view[1], _LEVELS), float("nan"))
    for channel in range(view[1]):
        table[channel].scatter_(0, codes[:, channel].reshape(-1).long(), first[:, channel].reshape(-1))
        if not torch.equal(_looked_up(table, codes, channel).view(torch.int32), bits[:, channel, 0]):
            return None
    return {CODES: codes, TABLE: table, SHAPE: torch.tensor([*values.shape])}


def _looked_up(table: torch.Tensor, codes: torch.Tensor, channel: int) -> torch.Tensor:
    """The values of one channel, (pictures or patches, pixels)."""
    return table[channel].index_select(0, codes[:, channel].reshape(-1).int()).view(len(codes), -1)


def restore(record: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Decode what `compress` made: the same values, bit for bit, on the device of the codes.

    Args:
        record: codes and table on one device; the shape on the CPU, where reading it waits for nothing.
    """
    codes, table = record[CODES], record[TABLE]
    shape = torch.Size(record[SHAPE].tolist())
    pictures, channels, pixels = codes.shape
    values = table.new_empty(pictures, channels, shape.numel() // codes.numel(), pixels)
    for channel in range(channels):
        values[:, channel] = _looked_up(table, codes, channel)[:, None]
    return values.view(shape)


def pack_pixels(tensors: Mapping[str, torch.Tensor], layout: PixelFormat) -> dict[str, torch.Tensor]:
    """The tensors of an image as they are stored: pixels as codes where nothing is lost.

    Args:
        tensors: of a processor, by name.
        layout: the processor's settings.
    """
    record: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        coded = compress(value, layout) if name == PIXELS else None
        record |= {name: value} if coded is None else {f"{name}.{part}": tensor for part, tensor in coded.items()}
    return record


def unpack_pixels(record: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `pack_pixels` made, in the processor's order of names, on the devices of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in record.items():
        if not name.startswith(f"{PIXELS}."):
            tensors[name] = value
        elif name == f"{PIXELS}.{CODES}":
            tensors[PIXELS] = restore({part: record[f"{PIXELS}.{part}"] for part in (CODES, TABLE, SHAPE)})
    return tensors


def is_about_codes(name: str) -> bool:
    """Whether a tensor of a packed image describes its codes: it is needed where the codes are decoded only."""
    return name in (f"{PIXELS}.{TABLE}", f"{PIXELS}.{SHAPE}")


def stays_on_cpu(name: str) -> bool:
    """Whether a tensor of a packed image is read by the CPU alone."""
    return name == f"{PIXELS}.{SHAPE}"


def is_pixels(name: str) -> bool:
    """True for the large tensors of a processor that only the vision tower reads."""
    return name.startswith("pixel_")


def feature_record(
    features: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What an image has instead of its pixels: its features, and the small tensors that positions need."""
    small = {name: value for name, value in tensors.items() if not is_pixels(name)}
    return small | {FEATURE_PREFIX + name: value for name, value in features.items()}


def features_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The features among the tensors of an image, by their own names; {} for an image with pixels."""
    return {
        name.removeprefix(FEATURE_PREFIX): value for name, value in tensors.items() if name.startswith(FEATURE_PREFIX)
    }

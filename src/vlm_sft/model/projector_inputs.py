"""The output of a frozen vision tower behind which the projector is trained: kept before it, projected in every pass.

What a family does behind its projector (dividing by image, undoing the order of windows) is found by running it once
with the projector's outputs replaced by their row numbers. What is kept of an image are the inputs of the projector
and the rows that its features are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from vlm_sft.common.errors import ModelError
from vlm_sft.data.cache.store import Record

INPUT, ROWS = "input.", "rows."  # names: "input.CALL.MODULE", and "rows." before the name of a feature
_WAY_OUT = "pass --feature_cache off"


def called_modules(modules: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """The modules of a projector that are called: a list has no forward pass, its members have."""
    for module in modules:
        listed = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
        yield from called_modules(module.children()) if listed else (module,)


@contextmanager
def marked(projectors: Sequence[torch.nn.Module]) -> Iterator[Record]:
    """Let the projector give row numbers, counted over its calls, in every column of its outputs (…, hidden).

    Args:
        projectors: the modules of it.

    Yields:
        What went into it, by name, after the vision tower has run in the block.
    """
    inputs: Record = {}
    first = 0

    def note(number: int, args: tuple[object, ...], kwargs: Mapping[str, object], output: object) -> torch.Tensor:
        nonlocal first
        value, *others = (*args, *kwargs.values())
        if not isinstance(value, torch.Tensor) or any(other is not None for other in others):
            raise ModelError("the projector takes more than the output of the vision tower", _WAY_OUT)
        if not isinstance(output, torch.Tensor):
            raise ModelError("the projector puts out more than one tensor", _WAY_OUT)
        inputs[f"{INPUT}{len(inputs)}.{number}"] = value
        rows = torch.arange(first, first + output[..., 0].numel(), device=output.device, dtype=torch.float32)
        first += len(rows)
        return rows.view(*output.shape[:-1], 1).expand(output.shape).contiguous()

    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, number=number: note(number, args, kwargs, output), with_kwargs=True
        )
        for number, module in enumerate(projectors)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def row_numbers(features: Mapping[str, torch.Tensor]) -> Record:
    """What features that were computed from row numbers are made of.

    Args:
        features: (…, hidden) by name, of an image whose tower ran inside `marked`.

    Returns:
        (…) int32 by name: rows of the projector's outputs.

    Raises:
        ModelError: they are no rows of it.
    """
    found = {}
    for name, value in features.items():
        rows = value[..., 0]
        if not bool((value == rows[..., None]).all() & (rows == rows.round()).all()):
            raise ModelError("features are no rows of what the projector puts out", _WAY_OUT)
        found[ROWS + name] = rows.to(torch.int32)
    return found


def projected(projectors: Sequence[torch.nn.Module], images: Sequence[Mapping[str, torch.Tensor]]) -> list[Record]:
    """Run the projector on what is kept of some images; gradients reach it.

    Args:
        projectors: the modules of it.
        images: what `marked` and `row_numbers` found of each image.

    Returns:
        The features of each image.
    """
    outputs: list[list[torch.Tensor]] = [[] for _ in images]
    for name in dict.fromkeys(name for image in images for name in image if name.startswith(INPUT)):
        holders = [index for index, image in enumerate(images) if name in image]
        values = [images[index][name] for index in holders]
        module = projectors[int(name.rsplit(".", 1)[1])]
        if len({value.shape[1:] for value in values}) == 1:  # as the model calls it: once on all images
            whole = module(torch.cat(values)).flatten(0, -2)
            parts = whole.split([len(whole) * len(value) // sum(map(len, values)) for value in values])
        else:
            parts = tuple(module(value).flatten(0, -2) for value in values)
        for index, part in zip(holders, parts, strict=True):
            outputs[index].append(part)
    return [
        {name.removeprefix(ROWS): torch.cat(own)[rows.long()] for name, rows in image.items() if name.startswith(ROWS)}
        for image, own in zip(images, outputs, strict=True)
    ]

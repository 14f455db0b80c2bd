"""FSDP2: weights, gradients and optimizer state divided over the ranks by PyTorch itself (`fully_shard`).

Every rank keeps some rows of each tensor (Zhao et al. 2023, arXiv:2304.11277; DTensors since FSDP2). The tensors of a
block are gathered when it computes and freed after it, so every rank has to take part in every pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlm_sft.distributed.collectives import agree, broadcast
from vlm_sft.distributed.zero import TO_BE_DIVIDED


def mark(model: torch.nn.Module) -> None:
    """Say of the weights of a model that they will be divided, for what looks at them before that."""
    for parameter in model.parameters():
        setattr(parameter, TO_BE_DIVIDED, True)


def divide(
    model: torch.nn.Module,
    blocks: Iterable[torch.nn.Module],
    whole: Iterable[torch.nn.Parameter],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Divide the weights of a model over the ranks; all ranks must call it.

    Rank 0 hands out one tensor at a time, so no other rank ever holds the model.

    Args:
        model: of the same architecture everywhere. The weights are those of rank 0; on other ranks they may be on the
            meta device. Afterwards its modules are FSDP modules, and its weights DTensors.
        blocks: modules inside of it whose weights are gathered block by block; all others are gathered together.
        whole: weights that every rank is to hold whole.
        device: where this rank computes.
        dtype: of the computation. In bfloat16 wider weights are gathered in it, and gradients added up in float32.
    """
    _agree_on_tensors_beside(model, device)
    places = _places(model)
    apart = {id(parameter) for parameter in whole}
    sources: list[torch.Tensor | None] = []
    ignored: set[torch.nn.Parameter] = set()
    specs = agree(lambda: [(parameter.shape, parameter.dtype) for parameter, _ in places])
    for (parameter, holders), (shape, exact) in zip(places, specs, strict=True):
        sources.append(None if parameter.is_meta else parameter.data)
        empty = torch.nn.Parameter(torch.empty(shape, dtype=exact, device="meta"), parameter.requires_grad)
        if id(parameter) in apart or not shape:
            ignored.add(empty)
        _put(empty, holders)
    half = dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in (*blocks, model):
        # The outermost one too: what is left whole behind a pass would be old after the next step.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=ignored)
    reduce_all: Any = getattr(model, "set_reduce_scatter_unused_params", None)
    if reduce_all is not None:  # an expert that no token of this rank went to is reduced with those of the others
        reduce_all(True)
    for index, (_, holders) in enumerate(places):
        place = holders[0][0].get_parameter(holders[0][1])
        source, sources[index] = sources[index], None
        _put(torch.nn.Parameter(_share(place, source, device), place.requires_grad), holders)


def _places(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]]]:
    """Every weight once, with all modules that hold it and its name there."""
    found: dict[int, tuple[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _put(parameter: torch.nn.Parameter, holders: Iterable[tuple[torch.nn.Module, str]]) -> None:
    for module, name in holders:
        setattr(module, name, parameter)


def _agree_on_tensors_beside(model: torch.nn.Module, device: torch.device) -> None:
    """Give all ranks the tensors of rank 0 that are no weights: buffers, and attributes of modules."""
    modules = dict(model.named_modules())
    first = agree(lambda: {path: _beside(module) for path, module in modules.items()})
    for path, tensors in first.items():
        for name, tensor in tensors.items():
            setattr(modules[path], name, tensor.to(device))


def _beside(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return own | dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _share(place: torch.Tensor, source: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """This rank's part of a tensor, on its device; all ranks must call it.

    Args:
        place: where it goes, divided or not; its own numbers are not looked at.
        source: the tensor, on rank 0.
        device: where this rank computes.
    """
    whole = torch.empty(place.shape, dtype=place.dtype, device=device) if source is None else source
    whole = whole.to(device, place.dtype).contiguous()
    broadcast(whole)
    if not isinstance(place, DTensor):
        return whole
    rows = -(-whole.shape[0] // torch.distributed.get_world_size())
    start = min(torch.distributed.get_rank() * rows, whole.shape[0])
    return like(whole[start : start + rows].clone(), place)


def like(own: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """A tensor that is divided as another one, if that is divided.

    Args:
        own: the part of this rank.
        place: the other one.
    """
    if not isinstance(place, DTensor):
        return own
    mesh = place.device_mesh
    return DTensor.from_local(
        own.to(mesh.device_type), mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )


@torch.no_grad()
def overwrite(place: torch.Tensor, source: torch.Tensor | None) -> None:
    """Overwrite a tensor of a model, divided or not, with one that rank 0 has; all ranks must call it.

    Args:
        place: the tensor.
        source: of the same shape, on rank 0; ignored elsewhere.
    """
    share = _share(place, source, own_part(place).device)
    own_part(place).copy_(own_part(share))


@torch.no_grad()
def whole_on_first(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor, divided or not, whole and in the memory of rank 0, a copy; None elsewhere. All ranks must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", copy=True) if torch.distributed.get_rank() == 0 else None


def number(tensor: torch.Tensor) -> float:
    """The value of a tensor () that may be divided; all ranks must call it."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def is_divided(model: torch.nn.Module) -> bool:
    """Whether `divide` has divided the weights of a model."""
    return isinstance(model, FSDPModule)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, divided or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

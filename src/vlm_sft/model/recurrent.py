"""Sharing an image through layers with a state: linear attention, short convolutions.

Behind a prefix such a layer has one state. All questions of the image start from it, as one padded batch, and are
computed as they would be in separate sequences; gradients flow back through the state. Exchanged like every other
forward: only where a numeric probe gave what the module itself gives for separate sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.families import STATEFUL
from vlm_sft.model.forward_patch import agrees, holds, is_exchanged, is_plain, replace_forward
from vlm_sft.model.mixers import MIXERS, Mixer, Sequences, State, first_state, joined_states
from vlm_sft.model.pack_context import current_pack
from vlm_sft.model.protocols import VisionLanguageModel
from vlm_sft.model.state_batches import Recurrence, StateBatch

_PROBE_ENDS = [[0, 5, 8, 9], [9, 11, 15]]  # two prefixes with two questions and one
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def share_states(model: VisionLanguageModel) -> int:
    """Let the layers with a state of a language model compute packs; returns how many were changed.

    Args:
        model: the Hugging Face model, not yet wrapped.
    """
    if is_plain():
        return 0
    found = 0
    for module in model.get_decoder().modules():
        mixer = mixer_of(module)
        if mixer is None or is_exchanged(module) or not holds(partial(_same, mixer), module):
            continue
        replace_forward(module, _forward_by(mixer))
        found += 1
    return found


def unshared_states(model: VisionLanguageModel) -> str:
    """Which kinds of layers of a language model carry a state and compute no packs; "" where there are none."""
    kinds = list(getattr(model.config.get_text_config(), "layer_types", None) or [])
    stateful = [kind for kind in kinds if kind in STATEFUL]
    shared = sum(is_exchanged(module) and mixer_of(module) is not None for module in model.get_decoder().modules())
    return ", ".join(sorted(set(stateful))) if shared < len(stateful) else ""


def recurrence_problem(model: torch.nn.Module) -> str | None:
    """Why layers with a state are not computed by kernels of their own on a GPU; None where they are, "" without any.

    Args:
        model: wrapped or not.
    """
    mixers = [mixer_of(module) for module in model.modules()]
    packages = {mixer.package for mixer in mixers if mixer is not None and mixer.package is not None}
    missing = sorted(distribution for name, distribution in packages if find_spec(name) is None)
    if missing:
        return f"{' and '.join(missing)} not installed"
    return None if packages else ""


def mixer_of(module: torch.nn.Module) -> Mixer | None:
    """What computes packs through a module; None where it is no layer with a state that is known."""
    try:
        return next((mixer for mixer in MIXERS if mixer.fits(module)), None)
    except Exception:  # an unknown module may raise anything when it is looked at
        return None


def _forward_by(mixer: Mixer) -> Callable[..., torch.Tensor]:
    """The forward of a layer with a state: (1, L, C) to (1, L, C) inside a pack, plain otherwise."""

    def forward(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        pack = current_pack()
        if pack.recurrence is None or args or hidden_states.shape[:2] != (1, pack.tokens):
            return module.forward_stepwise(hidden_states, *args, **kwargs)
        return _mixed(mixer, module, hidden_states, pack.recurrence)

    return forward


def _mixed(mixer: Mixer, module: Any, hidden: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
    """What a layer gives for the hidden states (1, L, C) of a pack, or of a step of generation behind one."""
    streams, gate = mixer.project(module, hidden)
    compute = _pack if recurrence.fed is None else _step
    return mixer.finish(module, compute(mixer, module, streams, recurrence), gate)


def _pack(mixer: Mixer, module: Any, streams: list[torch.Tensor], recurrence: Recurrence) -> torch.Tensor:
    """Outputs (L, V) for the streams (L, …) of a pack."""
    batches, kept = recurrence.batches(streams[0].device), recurrence.kept
    divided = iter(zip(*map(batches.divide, streams), strict=True))
    outputs: list[torch.Tensor] = []

    def scan(batch: StateBatch, begin: State, goes_on: bool) -> State | None:
        output, behind = mixer.scan(module, Sequences(next(divided), batch.lengths, batch.valid, goes_on), begin)
        outputs.append(output)
        return behind

    layer = mixer.convolution(module)
    first = [scan(batch, first_state(layer, len(batch.lengths), streams[0]), True) for batch in batches.prefixes]
    prefixes = joined_states(first)
    behind = [scan(batch, prefixes.rows(batch.parents), kept is not None) for batch in batches.questions]
    if kept is not None:
        kept[module] = joined_states(behind).rows(batches.order)
    return batches.join(outputs)


def _step(mixer: Mixer, module: Any, streams: list[torch.Tensor], recurrence: Recurrence) -> torch.Tensor:
    """Outputs (F, V) for one more token of each of the questions `fed`, which go on from their own states."""
    kept, fed = recurrence.kept, recurrence.fed
    assert kept is not None and fed is not None, "a generation step continues from a pack"
    before = kept[module]
    tokens = Sequences(tuple(stream[:, None] for stream in streams), torch.ones_like(fed), None, True)
    output, after = mixer.scan(module, tokens, before.rows(fed))
    assert after is not None, "tokens that go on leave a state"
    before.inputs.index_copy_(0, fed, after.inputs)
    if after.memory is not None:
        before.memory.index_copy_(0, fed, after.memory.to(before.memory.dtype))
    return output[:, 0]


@torch.no_grad()
def _same(mixer: Mixer, module: Any) -> bool:
    """Whether a pack of random hidden states comes out as its separate sequences do, through the module itself.

    Weights that are divided over the ranks cannot be tried; there the shape of the module decides.
    """
    if is_partitioned(*module.parameters()):
        return True
    weight = module.out_proj.weight
    generator = torch.Generator().manual_seed(0)
    channels = module.out_proj.out_features
    hidden = torch.randn(1, _PROBE_ENDS[-1][-1], channels, generator=generator).to(weight)
    expected = torch.empty_like(hidden)
    for start, prefix, *questions in _PROBE_ENDS:
        for begin, end in zip([prefix, *questions], questions, strict=False):
            alone = module(torch.cat([hidden[:, start:prefix], hidden[:, begin:end]], dim=1))
            expected[:, start:prefix] = alone[:, : prefix - start]
            expected[:, begin:end] = alone[:, prefix - start :]
    found = _mixed(mixer, module, hidden, Recurrence(_PROBE_ENDS))
    return agrees(found, expected, _TOLERANCE[weight.dtype])

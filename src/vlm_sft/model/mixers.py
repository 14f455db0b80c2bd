"""Layers that mix tokens through a state instead of attention, cut into the parts that sharing a prefix needs.

What a token gives and takes alone (projections, the gate, the output) is computed once over a whole pack. Only the part
between them goes from token to token: it starts from a state and returns the state behind its last token.

Shape suffixes: n sequences, T tokens of the longest, L tokens of a pack, K window of the short convolution, D channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from vlm_sft.model.cpu.causal_convolution import causal_convolution
from vlm_sft.model.cpu.delta_rule import delta_rule
from vlm_sft.model.cpu.gated_norm import gated_norm


@dataclass(frozen=True, slots=True)
class State:
    """What n sequences leave behind.

    Attributes:
        inputs: (n, K - 1, D), the last inputs of the short convolution, zero before the first token.
        memory: (n, …), the recurrent state; None before the first token, and for a layer that has none.
    """

    inputs: torch.Tensor
    memory: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> State:
        """The states of some sequences, (m,) int64."""
        memory = None if self.memory is None else self.memory.index_select(0, index)
        return State(self.inputs.index_select(0, index), memory)


def joined_states(states: Sequence[State | None]) -> State:
    """The states of several batches, which all go on, as those of one."""
    found = [state for state in states if state is not None]
    memories = [state.memory for state in found if state.memory is not None]
    return State(torch.cat([state.inputs for state in found]), torch.cat(memories) if memories else None)


@dataclass(frozen=True, slots=True)
class Sequences:
    """What goes through a layer from token to token.

    Attributes:
        streams: (n, T, …) each, what `Mixer.project` gave for the tokens.
        lengths: (n,) int64, tokens of each sequence; those behind are padding.
        valid: (n, T) bool, False at padding; None where there is none.
        goes_on: whether the state behind them is wanted.
    """

    streams: tuple[torch.Tensor, ...]
    lengths: torch.Tensor
    valid: torch.Tensor | None
    goes_on: bool

    def masked(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream (n, T, H), zero at padding."""
        return stream if self.valid is None else stream * self.valid[..., None]


class Mixer(Protocol):
    """One kind of layer with a state.

    Attributes:
        package: whose kernels compute it on a GPU where it is installed, by its names in Python and on PyPI; None where
            PyTorch's operators do.
    """

    package: tuple[str, str] | None

    def fits(self, module: Any) -> bool:
        """Whether a module is built like this kind; a numeric probe follows."""

    def project(self, module: Any, hidden: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What each token gives: streams (L, …) that go from token to token, and what its output is gated with."""

    def scan(self, module: Any, batch: Sequences, state: State) -> tuple[torch.Tensor, State | None]:
        """Go through n sequences from a state: to outputs (n, T, V), and the state behind them if they go on."""

    def convolution(self, module: Any) -> torch.nn.Conv1d:
        """The short convolution, over the first stream."""

    def finish(self, module: Any, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Outputs (L, V) of all tokens, gated and projected, (1, L, C)."""


class GatedDeltaNet:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464) as in Qwen3.5: a short convolution, then the delta rule."""

    package: tuple[str, str] | None = ("fla", "flash-linear-attention")

    def fits(self, module: Any) -> bool:
        """Whether a module has the projections of Qwen3.5's layer."""
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "conv1d", "norm", "A_log", "dt_bias")
        return all(hasattr(module, name) for name in names) and module.activation == "silu"

    def project(self, module: Any, hidden: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Inputs of the convolution, learning rates and log decays of each head; the gate of the norm."""
        rate = module.in_proj_b(hidden).sigmoid()
        step = F.softplus(module.in_proj_a(hidden).float() + module.dt_bias)
        decay = -module.A_log.float().exp() * step
        return [module.in_proj_qkv(hidden)[0], rate[0], decay[0]], module.in_proj_z(hidden)[0]

    def convolution(self, module: Any) -> torch.nn.Conv1d:
        """Over queries, keys and values."""
        return module.conv1d

    def scan(self, module: Any, batch: Sequences, state: State) -> tuple[torch.Tensor, State | None]:
        """Convolve, then update one matrix a head by the delta rule; padding changes no state."""
        inputs, rate, decay = batch.streams
        rate, decay = batch.masked(rate), batch.masked(decay)
        mixed, tail = short_convolution(module.conv1d, inputs, batch, state.inputs)
        sizes = (module.num_k_heads, module.num_v_heads, module.head_k_dim)
        rule = delta_rule if inputs.device.type == "cpu" else partial(_library_rule, module)
        output, memory = rule(F.silu(mixed), decay, rate, state.memory, sizes, batch.goes_on)
        return output, None if tail is None else State(tail, memory)

    def finish(self, module: Any, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The gated norm of each head, and the output projection."""
        width = module.head_v_dim
        heads, gates = mixed.reshape(-1, width), gate.reshape(-1, width)
        normed = gated_norm(module.norm, heads, gates)
        if normed is None:
            normed = module.norm(heads, gates)
        return module.out_proj(normed.reshape(1, *mixed.shape))


def _library_rule(
    module: Any,
    mixed: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    memory: torch.Tensor | None,
    sizes: tuple[int, int, int],
    goes_on: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `delta_rule` computes, by the function of transformers (flash-linear-attention's where it is installed)."""
    key_heads, heads, channels = sizes
    width = key_heads * channels
    query, key, value = mixed.split([width, width, mixed.shape[2] - 2 * width], dim=2)
    kind = "chunk_gated_delta_rule" if mixed.shape[1] > 1 else "recurrent_gated_delta_rule"
    rule = getattr(module, kind, None) or _library(module, f"torch_{kind}")
    output, behind = rule(
        query.unflatten(2, (key_heads, channels)),
        key.unflatten(2, (key_heads, channels)),
        value.unflatten(2, (heads, -1)),
        g=decay,
        beta=rate,
        initial_state=memory,
        output_final_state=goes_on,
        use_qk_l2norm_in_kernel=True,
    )
    return output.flatten(2), behind


class Mamba2:
    """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): a short convolution, then a state that decays by head."""

    package: tuple[str, str] | None = ("mamba_ssm", "mamba-ssm")

    def fits(self, module: Any) -> bool:
        """Whether a module has the one input projection and the parameters of Mamba-2."""
        return all(hasattr(module, name) for name in ("in_proj", "out_proj", "conv1d", "norm", "A_log", "dt_bias", "D"))

    def project(self, module: Any, hidden: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Inputs of the convolution and step sizes of each head; the gate of the norm."""
        sizes = [module.intermediate_size, module.conv_dim, module.num_heads]
        gate, inputs, step = module.in_proj(hidden)[0].split(sizes, dim=-1)
        return [inputs, F.softplus(step + module.dt_bias.to(step.dtype)).clamp(*module.time_step_limit)], gate

    def convolution(self, module: Any) -> torch.nn.Conv1d:
        """Over values, keys and queries."""
        return module.conv1d

    def scan(self, module: Any, batch: Sequences, state: State) -> tuple[torch.Tensor, State | None]:
        """Convolve, then update the state; a step of size zero, at padding, changes nothing."""
        inputs, step = batch.streams
        mixed, tail = short_convolution(module.conv1d, inputs, batch, state.inputs)
        width = module.n_groups * module.ssm_state_size
        values, key, query = module.act(mixed).split([module.intermediate_size, width, width], dim=-1)
        output, memory = _library(module, "mamba2_chunk_scan")(
            values.unflatten(-1, (-1, module.head_dim)),
            batch.masked(step),
            -module.A_log.float().exp(),
            key.unflatten(-1, (module.n_groups, -1)),
            query.unflatten(-1, (module.n_groups, -1)),
            chunk_size=module.chunk_size,
            D=module.D,
            z=None,
            initial_states=state.memory,
            return_final_states=True,
        )
        return output.flatten(2), None if tail is None else State(tail, memory)

    def finish(self, module: Any, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The gated norm, and the output projection."""
        return module.out_proj(module.norm(mixed[None], gate[None]).to(gate.dtype))


class ShortConvolution:
    """The gated short convolution of LFM2 and LFM3 (Liquid AI 2025): B · x, a causal window, · C."""

    package: tuple[str, str] | None = None

    def fits(self, module: Any) -> bool:
        """Whether a module is one projection to three, a convolution and one projection back."""
        named = all(hasattr(module, name) for name in ("in_proj", "out_proj", "conv", "conv_kernel_size"))
        return named and isinstance(module.conv, torch.nn.Conv1d)

    def project(self, module: Any, hidden: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Inputs of the convolution; the gate of its outputs."""
        inner, outer, values = module.in_proj(hidden)[0].chunk(3, dim=-1)
        return [inner * values], outer

    def convolution(self, module: Any) -> torch.nn.Conv1d:
        """Over gated values."""
        return module.conv

    def scan(self, module: Any, batch: Sequences, state: State) -> tuple[torch.Tensor, State | None]:
        """Convolve."""
        mixed, tail = short_convolution(module.conv, batch.streams[0], batch, state.inputs)
        return mixed, None if tail is None else State(tail)

    def finish(self, module: Any, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The gate, and the output projection."""
        return module.out_proj((gate * mixed)[None])


def short_convolution(
    layer: torch.nn.Conv1d, inputs: torch.Tensor, batch: Sequences, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A causal depthwise convolution that continues n sequences.

    Args:
        layer: with a window of K tokens.
        inputs: (n, T, D).
        batch: the sequences.
        before: (n, K - 1, D), the inputs before the first.

    Returns:
        The outputs, (n, T, D), and the last K - 1 inputs of each sequence if they go on.
    """
    width = before.shape[1]
    mixed = causal_convolution(layer, inputs, before)
    if mixed is not None and not batch.goes_on:
        return mixed, None
    whole = torch.cat([before, inputs], dim=1)
    if mixed is None:
        channels = whole.transpose(1, 2).to(layer.weight.dtype)
        if whole.is_cuda and whole.shape[2] % 8 == 0 and find_spec("causal_conv1d") is not None:
            from causal_conv1d import causal_conv1d_fn

            mixed = causal_conv1d_fn(channels, layer.weight.squeeze(1), layer.bias)[:, :, width:]
        else:
            mixed = F.conv1d(channels, layer.weight, layer.bias, groups=layer.groups)
        mixed = mixed.transpose(1, 2).to(inputs.dtype)
    last = batch.lengths[:, None] + torch.arange(width, device=inputs.device)[None, :]
    return mixed, whole.gather(1, last[..., None].expand(-1, -1, whole.shape[2]))


def first_state(layer: torch.nn.Conv1d, count: int, stream: torch.Tensor) -> State:
    """The state before the first token of so many sequences: no inputs of the convolution, and no memory.

    Args:
        layer: the short convolution.
        count: n.
        stream: its inputs, (…, D).
    """
    return State(stream.new_zeros(count, layer.kernel_size[0] - 1, stream.shape[-1]))


def _library(module: Any, name: str) -> Any:
    """A function of the file that defines a module in transformers, which calls a faster package where there is one."""
    return getattr(inspect.getmodule(type(module)), name)


MIXERS: tuple[Mixer, ...] = (GatedDeltaNet(), Mamba2(), ShortConvolution())

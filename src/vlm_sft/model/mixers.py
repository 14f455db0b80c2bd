"""Layers that mix tokens through a state instead of attention, cut into the parts that sharing a prefix needs.

What a token gives and takes alone (projections, the gate, the output) is computed once over a whole pack. Only the part
between them goes from token to token: it starts from a state and returns the state behind its last token.

Shape suffixes: n sequences, T tokens of the longest, L tokens of a pack, K window of the short convolution, D channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F

# Tokens that transformers' own form of the delta rule computes at once; on CPUs 32 take half the time of its 64.
_LONGEST_CHUNK, _SHORTEST_CHUNK = 32, 8


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


def joined_states(states: Sequence[State]) -> State:
    """The states of several batches as those of one."""
    memories = [state.memory for state in states if state.memory is not None]
    return State(torch.cat([state.inputs for state in states]), torch.cat(memories) if memories else None)


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

    def scan(
        self, module: Any, streams: list[torch.Tensor], lengths: torch.Tensor, valid: torch.Tensor | None, state: State
    ) -> tuple[torch.Tensor, State]:
        """Go through n sequences from a state: streams (n, T, …) to outputs (n, T, V), and the state behind them."""

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

    def scan(
        self, module: Any, streams: list[torch.Tensor], lengths: torch.Tensor, valid: torch.Tensor | None, state: State
    ) -> tuple[torch.Tensor, State]:
        """Convolve, then update one matrix a head by the delta rule; padding changes no state."""
        inputs, rate, decay = streams
        if valid is not None:
            rate, decay = rate * valid[..., None], decay * valid[..., None]
        mixed, tail = short_convolution(module.conv1d, inputs, lengths, state.inputs)
        width, channels = module.head_k_dim, module.key_dim
        query, key, value = F.silu(mixed).split([channels, channels, module.value_dim], dim=-1)
        rule, settings = _delta_rule(module, inputs.shape[1])
        output, memory = rule(
            query.unflatten(-1, (-1, width)),
            key.unflatten(-1, (-1, width)),
            value.unflatten(-1, (-1, module.head_v_dim)),
            g=decay,
            beta=rate,
            initial_state=state.memory,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            **settings,
        )
        return output.flatten(2), State(tail, memory)

    def finish(self, module: Any, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The gated norm of each head, and the output projection."""
        width = module.head_v_dim
        normed = module.norm(mixed.reshape(-1, width), gate.reshape(-1, width))
        return module.out_proj(normed.reshape(1, *mixed.shape))


def _delta_rule(module: Any, tokens: int) -> tuple[Any, dict[str, int]]:
    """The function that transformers computes the rule with (flash-linear-attention's where that is installed)."""
    kind = "chunk_gated_delta_rule" if tokens > 1 else "recurrent_gated_delta_rule"
    rule = getattr(module, kind, None) or _library(module, f"torch_{kind}")
    if tokens == 1:
        return rule, {}
    chunk = min(_LONGEST_CHUNK, max(_SHORTEST_CHUNK, 1 << (tokens - 1).bit_length()))
    return rule, {"chunk_size": chunk}


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

    def scan(
        self, module: Any, streams: list[torch.Tensor], lengths: torch.Tensor, valid: torch.Tensor | None, state: State
    ) -> tuple[torch.Tensor, State]:
        """Convolve, then update the state; a step of size zero, at padding, changes nothing."""
        inputs, step = streams
        if valid is not None:
            step = step * valid[..., None]
        mixed, tail = short_convolution(module.conv1d, inputs, lengths, state.inputs)
        width = module.n_groups * module.ssm_state_size
        values, key, query = module.act(mixed).split([module.intermediate_size, width, width], dim=-1)
        output, memory = _library(module, "mamba2_chunk_scan")(
            values.unflatten(-1, (-1, module.head_dim)),
            step,
            -module.A_log.float().exp(),
            key.unflatten(-1, (module.n_groups, -1)),
            query.unflatten(-1, (module.n_groups, -1)),
            chunk_size=module.chunk_size,
            D=module.D,
            z=None,
            initial_states=state.memory,
            return_final_states=True,
        )
        return output.flatten(2), State(tail, memory)

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

    def scan(
        self, module: Any, streams: list[torch.Tensor], lengths: torch.Tensor, valid: torch.Tensor | None, state: State
    ) -> tuple[torch.Tensor, State]:
        """Convolve."""
        mixed, tail = short_convolution(module.conv, streams[0], lengths, state.inputs)
        return mixed, State(tail)

    def finish(self, module: Any, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The gate, and the output projection."""
        return module.out_proj((gate * mixed)[None])


def short_convolution(
    layer: torch.nn.Conv1d, inputs: torch.Tensor, lengths: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal depthwise convolution that continues n sequences.

    Args:
        layer: with a window of K tokens.
        inputs: (n, T, D).
        lengths: (n,) int64, tokens of each sequence; those behind are padding.
        before: (n, K - 1, D), the inputs before the first.

    Returns:
        The outputs, (n, T, D), and the last K - 1 inputs of each sequence.
    """
    whole = torch.cat([before, inputs], dim=1)
    width = before.shape[1]
    last = lengths[:, None] + torch.arange(width, device=lengths.device)[None, :]
    tail = whole.gather(1, last[..., None].expand(-1, -1, whole.shape[2]))
    channels = whole.transpose(1, 2).to(layer.weight.dtype)
    if whole.is_cuda and whole.shape[2] % 8 == 0 and find_spec("causal_conv1d") is not None:
        from causal_conv1d import causal_conv1d_fn

        mixed = causal_conv1d_fn(channels, layer.weight.squeeze(1), layer.bias)[:, :, width:]
    else:
        mixed = F.conv1d(channels, layer.weight, layer.bias, groups=layer.groups)
    return mixed.transpose(1, 2).to(inputs.dtype), tail


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

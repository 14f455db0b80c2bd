"""What this package uses of a Hugging Face vision-language model.

transformers has a class for every family and no common one that declares all of this, so the parts are written down
here; `layout.require_layout` refuses families that lack them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import torch


class InnerModel(Protocol):
    """The part without the head: a vision tower, a projector and a language model side by side.

    Families of M-RoPE also have `get_rope_index`, see `packed_forward.Positions`.

    Attributes:
        config: the configuration of the whole model.
        get_image_features: what pixels become before they enter the language model.
    """

    config: Any
    get_image_features: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states behind the last norm, (1, L, C), are the first item of the output."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules."""

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """The towers, the projector, the language model."""

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules by their path."""

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All weights by their path."""


class VisionLanguageModel(Protocol):
    """An image-text-to-text model of transformers, without wrappers.

    Attributes:
        config: its `PreTrainedConfig`, with `model_type`, `sub_configs` and `get_text_config()`.
        model: everything but the head.
        forward: its signature says which inputs the family takes.
        training: whether dropout is on.
    """

    config: Any
    model: InnerModel
    forward: Callable[..., Any]
    training: bool

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An output with `logits`, (1, S, V)."""

    def get_decoder(self) -> Any:
        """The language model, with `layers`."""

    def get_input_embeddings(self) -> Any:
        """The embedding of tokens."""

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary."""

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """Choose attention functions by their registered names."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules."""

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules by their path."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All weights."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All weights by their path."""

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """All weights and buffers by their path."""

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on or off."""

    def eval(self) -> Any:
        """Switch dropout off."""


# A model with or without the wrappers of PEFT, DDP or DeepSpeed; `vision_features.unwrap` takes them off.
AnyModel: TypeAlias = torch.nn.Module | VisionLanguageModel

"""Whether a model is built as needed: one language model that reads the tokens of images."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from vlm_sft.common.errors import ModelError, quoted
from vlm_sft.model.attention import assign_attention, attention_names
from vlm_sft.model.families import FAMILIES
from vlm_sft.model.hub import model_config
from vlm_sft.model.protocols import VisionLanguageModel

T = TypeVar("T")


def require_layout(config: PreTrainedConfig, name: str) -> None:
    """Refuse a family whose models are built otherwise; nothing but its configuration is needed.

    Args:
        config: of the model.
        name: what the user calls it.

    Raises:
        ModelError: why it cannot be used, or which package its model needs.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None:
        if family.package and find_spec(family.package) is None:
            raise ModelError(
                f"--base_model {name}: models of the family {quoted(config.model_type)} need {family.package}",
                f"pip install {family.package}, or use another base",
            )
        return
    try:
        model = without_weights(config)
    except ImportError as error:  # its text says what to install
        raise ModelError(
            f"--base_model {name}: {' '.join(str(error).split())}", "install that package, or use another base"
        ) from error
    except Exception:  # some models cannot be built without their weights: loading them shows what is wrong
        return
    problem = layout_problem(model)
    if problem:
        raise ModelError(
            f"--base_model {name}: models of the family {quoted(config.model_type)} are not supported: {problem}",
            "use a model of the Qwen2.5-VL family, or of another one in docs/FAMILIES.md",
        )


def without_weights(config: PreTrainedConfig, **settings: Any) -> Any:
    """The architecture that a configuration describes, on the meta device.

    Args:
        config: the configuration.
        **settings: further arguments of transformers' `from_config`.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **settings)


def empty_model(path: str, **settings: Any) -> Any:
    """The architecture of a base model without weights; settings as of `without_weights`."""
    return without_weights(model_config(path), **settings)


def through_sdpa(opened: Callable[..., T], path: str) -> T:
    """Open a model whose parts attend through SDPA, or by transformers' own products where they take nothing else.

    Args:
        opened: opens it, with `attn_implementation` as its argument.
        path: what transformers opens.
    """
    try:
        return opened(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    model = empty_model(path)
    assign_attention(model, "sdpa")
    return opened(attn_implementation=attention_names(model))


def layout_problem(model: VisionLanguageModel) -> str | None:
    """Why a model cannot be used; None where one language model reads the tokens of images among its own.

    Args:
        model: an image-text-to-text model, with weights or without.
    """
    if model.config.is_encoder_decoder:
        return "a separate decoder writes the answer"
    if getattr(model.config.get_text_config(), "cross_attention_layers", None):
        return "its language model looks at images by cross-attention and has no tokens for them"
    inner, decoder = getattr(model, "model", None), model.get_decoder()
    if inner is None or decoder is inner or all(part is not decoder for part in inner.modules()):
        return f"{type(model).__name__} does not hold its vision tower and its language model side by side in `model`"
    return None

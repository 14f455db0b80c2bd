"""Whether the questions of an image may share it on one model: a table, or a self-check.

The self-check runs the real model on questions about tiny random images, once behind shared prefixes and once in
separate sequences through plain transformers, and compares the logits of the answers. Sliding windows and chunks that
are longer than these sequences would prove nothing, so they are shortened while the check runs. Where questions may not
share, another one finds out whether separate sequences may be padded to one batch.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_sft.common.console import say
from vlm_sft.common.errors import ModelError
from vlm_sft.data.cache.image_tensors import feature_record
from vlm_sft.data.collate import collate
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.engine_options import Rows
from vlm_sft.data.packing import Bundle
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model import packed_forward
from vlm_sft.model.cpu.matmul import mixed_precision, narrows
from vlm_sft.model.families import (
    CHUNK,
    WINDOW,
    Kind,
    PackMode,
    declared_mode,
    family_of,
    is_proven,
    separate_mode,
    sharing_mode,
)
from vlm_sft.model.forward_patch import evaluating, reason_of
from vlm_sft.model.load import Base, attention_of, is_blockwise
from vlm_sft.model.protocols import AnyModel, VisionLanguageModel
from vlm_sft.model.recurrent import unshared_states
from vlm_sft.model.vision_features import encode_images, trained_projector

# Root mean square difference of the logits, relative to their spread, that rounding explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_WIDENED = "vlm_sft_widened"  # attribute of a model that failed in bfloat16 and computes in float32
_SHARE = 3  # a window or chunk is at most this part of the shortest sequence
_SIZES = ((72, 56), (56, 96))  # of the images, in pixels
_QUESTIONS = ("What is it?", "How many of them are there, and where?", "Why?")


def choose_mode(model: AnyModel, encoder: Encoder) -> PackMode:
    """Decide how the packs of a model are computed.

    Args:
        model: the model, wrapped by PEFT or not, with its final attention function set.
        encoder: encodes questions for it.

    Returns:
        The declared mode of a known family; for an unknown one sharing when the self-check passes, else "separate"
        with a note for the user. A family that is declared not to share is proven to take padded batches.

    Raises:
        ModelError: the model cannot compute a question about an image at all.
    """
    mode = _sharing_mode(model, encoder)
    config = packed_forward.unwrap(model).config
    declared = is_proven(config) and family_of(config).reason
    return mode if mode.shares or declared else _with_rows(model, encoder, mode)


def _sharing_mode(model: AnyModel, encoder: Encoder) -> PackMode:
    """Whether questions share their image."""
    base = packed_forward.unwrap(model)
    _widen_if_it_fails(model, encoder)
    dtype = base.get_input_embeddings().weight.dtype
    kind: Kind = "blockwise" if is_blockwise(base) else "dense"
    declared = declared_mode(base.config, kind, unshared_states(base))
    if declared is not None:
        require_computable(model, encoder, whole=not is_proven(base.config))
        return declared
    if is_partitioned(*base.parameters()):
        return separate_mode(
            base.config, "an unknown family cannot be checked while its weights are divided over the ranks"
        )
    try:
        error = sharing_error(model, encoder, kind)
    except Exception as failure:  # an unknown architecture may raise anything
        require_computable(model, encoder, whole=True)
        return separate_mode(base.config, f"shared questions cannot be computed ({reason_of(failure)})")
    if error <= TOLERANCE[dtype]:
        return sharing_mode(base.config, kind)
    return separate_mode(base.config, f"shared questions differ from separate ones (by {error:.2g} of the logits)")


def _with_rows(model: AnyModel, encoder: Encoder, mode: PackMode) -> PackMode:
    """How the separate sequences of an unproven model run together; a note where that is not as one padded batch."""
    base = packed_forward.unwrap(model)
    if is_partitioned(*base.parameters()):
        return replace(
            mode,
            rows="single",
            note=f"{mode.note}; one by one, since batches cannot be checked while weights are divided",
        )
    tolerance = TOLERANCE[base.get_input_embeddings().weight.dtype]
    problem = _rows_problem(model, encoder, "padded", tolerance)
    if problem is None:
        return mode
    if _rows_problem(model, encoder, "equal", tolerance) is None:
        return replace(mode, rows="equal", note=f"{mode.note}; only questions of one length run together: {problem}")
    return replace(mode, rows="single", note=f"{mode.note}; one by one: {problem}")


def _rows_problem(model: AnyModel, encoder: Encoder, rows: Rows, tolerance: float) -> str | None:
    """Why separate sequences may not run together so; None where they give what they give alone."""
    try:
        error = rows_error(model, encoder, rows)
    except Exception as failure:  # an unknown architecture may raise anything
        return f"a batch of them cannot be computed ({reason_of(failure)})"
    return None if error <= tolerance else f"in a padded batch they differ (by {error:.2g} of the logits)"


@torch.no_grad()
def rows_error(model: AnyModel, encoder: Encoder, rows: Rows) -> float:
    """Compare the logits of separate sequences in one batch with those of each alone.

    Args:
        model: the model; its training flag is kept.
        encoder: encodes questions for it.
        rows: "padded": questions of several lengths about two images; "equal": a question about one, twice.

    Returns:
        As `sharing_error`.
    """
    groups = probe_groups(encoder)
    pack = [Bundle(0, (0, 0))] if rows == "equal" else all_questions(groups)
    mode = PackMode("separate")
    base = packed_forward.unwrap(model)
    with evaluating(model), limited_windows(base, groups):
        together = _logits(model, pack, groups, mode)
        alone = torch.cat([_logits(model, one, groups, mode) for one in each_alone(pack)])
    return difference(together, alone)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square difference of logits, divided by the standard deviation of the expected ones."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def probe_groups(encoder: Encoder, with_answers: bool = True) -> list[EncodedGroup]:
    """A few questions of different lengths about two tiny images of noise."""
    probes = [_probe(seed, size) for seed, size in enumerate(_SIZES)]
    return [encoder.encode(probe, with_answers=with_answers) for probe in probes]


def all_questions(groups: list[EncodedGroup]) -> list[Bundle]:
    """All questions of all images of some `probe_groups`, as one pack."""
    return [Bundle(index, tuple(range(len(group.questions)))) for index, group in enumerate(groups)]


def each_alone(pack: list[Bundle]) -> list[list[Bundle]]:
    """A pack for each question."""
    return [[Bundle(bundle.group, (number,))] for bundle in pack for number in bundle.questions]


def _widen_if_it_fails(model: AnyModel, encoder: Encoder) -> None:
    """Compute a family that is not declared in float32 where it fails with its products alone in bfloat16.

    A module that multiplies by the weights of its layers itself, not by calling them, meets float32 there.

    Args:
        model: changed in place.
        encoder: encodes a question for it.
    """
    base: Any = packed_forward.unwrap(model)
    weight = base.get_input_embeddings().weight
    if is_proven(base.config) or weight.dtype != torch.bfloat16 or not narrows(weight.device):
        return
    try:
        _compute_probe(model, encoder)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # an unknown architecture may raise anything
        base.float()
        setattr(base, _WIDENED, True)
        say(f"{base.config.model_type} fails with its products in bfloat16 ({reason_of(failure)}): float32 is computed")


def computation_of(base: Base, model: AnyModel) -> dict[str, str]:
    """What run.json says of how a model computes.

    Args:
        base: what was loaded.
        model: of it, after `choose_mode`, wrapped or not.

    Returns:
        `attention`: its function; `dtype`: what computes; and `loaded_dtype` where the weights were loaded in another
        format, which failed.
    """
    whole = packed_forward.unwrap(model)
    widened = hasattr(whole, _WIDENED)
    formats = {"dtype": "float32", "loaded_dtype": base.dtype_name} if widened else {"dtype": base.dtype_name}
    return {"attention": attention_of(whole), **formats}


@torch.no_grad()
def _compute_probe(model: AnyModel, encoder: Encoder) -> None:
    """Let plain transformers compute a question about a small image."""
    with evaluating(model):
        _logits(model, [Bundle(0, (0,))], [encoder.encode(_probe(0, _SIZES[0]))], PackMode("separate"))


class _ReachedError(Exception):
    """The layer behind those that are tried is called."""


def require_computable(model: AnyModel, encoder: Encoder, whole: bool) -> None:
    """Make sure that plain transformers computes a question about a small image.

    A processor that belongs to another model makes pictures or placeholders that the model does not take, and what it
    raises then can be anything.

    Args:
        model: the model.
        encoder: encodes questions for it.
        whole: compute all layers; False for a family that is known: its images and its first layer are tried.

    Raises:
        ModelError: it does not.
    """
    base = packed_forward.unwrap(model)
    if is_partitioned(*base.parameters()):
        return

    def stop(*_: object) -> None:
        raise _ReachedError

    layers: Any = getattr(base.get_decoder(), "layers", ())
    hook = None if whole or len(layers) < 2 else layers[1].register_forward_pre_hook(stop)
    try:
        _compute_probe(model, encoder)
    except _ReachedError:
        pass
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Exception as failure:
        raise ModelError(
            f"{type(base).__name__} cannot compute a question about an image as its processor "
            f"({type(encoder.processor).__name__}) prepares it: {reason_of(failure)}",
            "make sure that processor, configuration and weights in the model's folder are of one model",
        ) from failure
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def sharing_error(model: AnyModel, encoder: Encoder, kind: Kind) -> float:
    """Compare the logits of shared and separate questions about two tiny random images.

    Args:
        model: the model; its training flag is kept.
        encoder: encodes questions for it.
        kind: how the shared pack is computed, "blockwise" or "dense".

    Returns:
        Root mean square difference of the logits that predict answers, divided by their standard deviation.
    """
    groups = probe_groups(encoder)
    everything = all_questions(groups)
    base = packed_forward.unwrap(model)
    with evaluating(model), limited_windows(base, groups):
        shared = _logits(model, everything, groups, sharing_mode(base.config, kind))
        separate = torch.cat([_logits(model, pack, groups, PackMode("separate")) for pack in each_alone(everything)])
    return difference(shared, separate)


def features_doubt(model: AnyModel, encoder: Encoder) -> str:
    """Why kept vision features may not stand for the pixels; "" where nothing speaks against it.

    A declared family is not checked, unless its projector is trained: how that can be run alone is found by structure.

    Args:
        model, encoder: as for `choose_mode`.
    """
    base = packed_forward.unwrap(model)
    projected = bool(trained_projector(model))
    if is_proven(base.config) and not projected:
        return ""
    if is_partitioned(*base.parameters()):
        whose = "inputs of a trained projector" if projected else "those of an unknown family"
        return f"{whose} cannot be checked while the weights are divided over the ranks"
    try:
        error = features_error(model, encoder)
    except Exception as failure:  # an unknown architecture may raise anything
        what = (
            "the trained projector cannot be run apart from its tower"
            if projected
            else "they cannot be computed by themselves"
        )
        return f"{what} ({reason_of(failure)})"
    if error <= TOLERANCE[base.get_input_embeddings().weight.dtype]:
        return ""
    return f"answers differ behind them (by {error:.2g} of the logits)"


@torch.no_grad()
def features_error(model: AnyModel, encoder: Encoder) -> float:
    """Compare the logits of questions behind kept vision features with those behind pixels.

    Args:
        model, encoder: as for `sharing_error`.

    Returns:
        As `sharing_error`.
    """
    groups = [encoder.encode(_probe(seed, size)[:1]) for seed, size in enumerate(_SIZES)]
    mode = choose_mode(model, encoder)
    bundles = [Bundle(index, (0,)) for index in range(len(groups))]
    packs = [bundles] if mode.shares else each_alone(bundles)
    with evaluating(model):
        features = [encode_images(model, [group.tensors])[0] for group in groups]
        kept = [
            replace(group, tensors=feature_record(found, group.tensors))
            for group, found in zip(groups, features, strict=True)
        ]
        expected = torch.cat([_logits(model, pack, groups, mode) for pack in packs])
        found = torch.cat([_logits(model, pack, kept, mode) for pack in packs])
    return difference(found, expected)


def _logits(model: AnyModel, pack: list[Bundle], groups: list[EncodedGroup], mode: PackMode) -> torch.Tensor:
    """Logits of the supervised positions of a pack, (S, V) float64."""
    base = packed_forward.unwrap(model)
    batch = collate(pack, groups).to(base.device)
    # What is trained in full is held in float32 beside frozen weights in bfloat16.
    dtype = base.get_input_embeddings().weight.dtype
    with packed_forward.packed(batch, mode, 0), mixed_precision(batch.group.device, dtype):
        return packed_forward.forward(model, batch, mode).logits[0].double()


def _probe(seed: int, size: tuple[int, int]) -> list[Sample]:
    """Questions about one image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    image = ImageRef.from_bytes(stream.getvalue(), "self-check")
    return [Sample(f"probe/{text}", "probe", "", (image,), text, "12 34", ("12 34",)) for text in _QUESTIONS]


@contextmanager
def limited_windows(base: VisionLanguageModel, groups: list[EncodedGroup]) -> Iterator[None]:
    """Make windows and chunks of the language model shorter than the sequences of a check while the block runs."""
    shortest = min(len(group.prefix_ids) + question.tokens for group in groups for question in group.questions)
    tokens = shortest // _SHARE
    parts = [(part, getattr(part, "config", None)) for part in base.get_decoder().modules()]
    holders = [base.config.get_text_config(), *(holder for pair in parts for holder in pair)]
    longer = [
        (holder, name, value)
        for holder in {id(holder): holder for holder in holders}.values()
        for name in (WINDOW, CHUNK)
        if isinstance(value := getattr(holder, name, None), int) and value > tokens
    ]
    for holder, name, _ in longer:
        setattr(holder, name, tokens)
    try:
        yield
    finally:
        for holder, name, value in longer:
            setattr(holder, name, value)

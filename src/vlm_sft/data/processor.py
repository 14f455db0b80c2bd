"""What is asked of a Hugging Face processor beside its work: ids, bounds, counts, faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm_sft.common.errors import ModelError, SampleError
from vlm_sft.data.images import FIX
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import UNPROCESSABLE

MESSAGE_CHARACTERS = 200  # of another library's message


@contextmanager
def blamed_on(source: str, processor: Any) -> Iterator[None]:
    """Whatever a processor raises for the pictures of one sample is that sample's fault.

    Args:
        source: where the pictures are; "" for a text row.
        processor: what runs inside; nothing else should.

    Raises:
        SampleError: it raised something.
        ModelError: it raised something for a text row: every one would fail.
    """
    try:
        yield
    except Exception as error:  # ValueError for a shape, RuntimeError from torch, ZeroDivisionError, …
        line = (str(error).strip().splitlines() or [""])[0][:MESSAGE_CHARACTERS]
        name, told = type(processor).__name__, f"{type(error).__name__}: {line}"
        if not source:
            raise ModelError(
                f"{name} cannot process a question without an image: {told}", "leave text rows out for this base model"
            ) from error
        raise SampleError(UNPROCESSABLE, f"{source}: {name} cannot process the image: {told}", FIX) from error


def visual_tokens(processor: Any, width: int, height: int, source: str = "") -> int | None:
    """How many tokens a picture becomes, by the processor's own arithmetic; None where it has none.

    Args:
        processor: a Hugging Face processor.
        width, height: of the picture in pixels.
        source: where it is, for messages.

    Raises:
        SampleError: the processor refuses such a picture.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return None
    with blamed_on(source or f"{width} x {height} pixels", processor):
        return int(count(image_sizes=[(height, width)]).num_image_tokens[0])


def image_token_id(processor: Any) -> int:
    """The id of the token that stands for one visual token."""
    # The tokenizer first: in Gemma 3 the processor's own token marks where an image begins.
    named = [getattr(owner, "image_token_id", None) for owner in (processor.tokenizer, processor)]
    # Llama 4 and Ovis 2 put these in the place of their image token.
    atom = "<IMG_ATOM>" if type(processor).__name__ == "Ovis2Processor" else None
    patch = getattr(processor, "img_patch_token", atom)
    if patch is not None:
        named.insert(0, processor.tokenizer.convert_tokens_to_ids(str(patch)))
    token = getattr(processor, "image_token", None)
    if token is not None:
        named.append(processor.tokenizer.convert_tokens_to_ids(str(token)))
    found = next((value for value in named if isinstance(value, int)), None)
    if found is None:
        raise ModelError(f"{type(processor).__name__} names no image token", "use an image-text-to-text model")
    # Molmo 2 replaces its image token by others, of which the first stands for a visual token.
    expanded = [value for value in getattr(processor, "image_token_ids", ()) if isinstance(value, int)]
    return found if found in expanded or len(expanded) < 2 else expanded[0]


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The end token of a tokenizer.

    Raises:
        ModelError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"no token ends an answer: {type(tokenizer).__name__} of the base model has no eos_token, and its "
            "generation settings name none",
            "set eos_token_id in generation_config.json, or eos_token in tokenizer_config.json, of the model's folder",
        )
    return (int(tokenizer.eos_token_id),)


def apply_pixel_bounds(processor: Any, prompt: PromptSettings) -> None:
    """Set the bounds of the image area on processors that resize by area (Qwen: `size.shortest_edge/longest_edge`).

    Raises:
        ModelError: bounds were asked for and the processor has no such setting.
    """
    if prompt.min_pixels is None and prompt.max_pixels is None:
        return
    images = processor.image_processor
    size = getattr(images, "size", None)
    keys = dict(size) if size is not None else {}
    edges = {key: value for key, value in keys.items() if value is not None}
    if hasattr(images, "merge_size") and {"shortest_edge", "longest_edge"} <= set(edges):
        low = prompt.min_pixels or edges["shortest_edge"]
        high = prompt.max_pixels or edges["longest_edge"]
        images.size = {"shortest_edge": min(low, high), "longest_edge": high}
        return
    raise ModelError(
        f"{type(images).__name__} has no bounds on an image's area, so max_pixels cannot be applied",
        "leave out --max_pixels and --min_pixels for this model",
    )

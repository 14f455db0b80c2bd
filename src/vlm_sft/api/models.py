"""Ask and evaluate a model: the base, and the adapter of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_sft.api.process_state import restored
from vlm_sft.api.views import Table
from vlm_sft.common import artifacts
from vlm_sft.common.errors import DataError, bounded, quoted
from vlm_sft.data.images import check_image
from vlm_sft.data.sample import ImageRef
from vlm_sft.evaluate.demo_page import PORT, open_page, require_gradio
from vlm_sft.evaluate.interactive import Asker, open_asker

IMAGES = "pass a PIL image, a path, bytes of a picture, or a NumPy array of uint8"


class Answers(Table):
    """Answers to questions: rows of `question`, `base`, `tuned`; `tuned` is None without an adapter."""


def model_of(folder: str | Path) -> tuple[str | None, Path | None]:
    """The base and the adapter of a run: (None, folder) for an adapter, (folder, None) for a whole model."""
    whole = artifacts.holds_full_model(Path(folder))
    return (str(folder), None) if whole else (None, Path(folder))


Pairs = list[tuple[tuple[ImageRef, ...], list[str]]]  # what is shown together, and what is asked of it


def pairs_of(images: Any, questions: str | Sequence[str]) -> Pairs:
    """Put images and questions together: the questions of each image.

    Args:
        images: a picture, or a list of as many as there are questions; an entry may be a list of pictures.
        questions: one text, or several.

    Raises:
        DataError: an image cannot be read, or they do not pair.
    """
    texts = [questions] if isinstance(questions, str) else list(questions)
    if not texts:
        raise DataError("there is no question", "pass one or several")
    if not isinstance(images, list | tuple):
        return [((_checked(images),), texts)]
    if len(images) != len(texts):
        raise DataError(
            f"{len(images)} images and {len(texts)} questions do not pair",
            "pass one image for all questions, or as many images as questions",
        )
    together = [image if isinstance(image, list | tuple) else [image] for image in images]
    return [(tuple(map(_checked, shown)), [text]) for shown, text in zip(together, texts, strict=True)]


def _checked(image: Any) -> ImageRef:
    """One image, decoded once."""
    if isinstance(image, str | Path):
        try:
            return check_image(ImageRef.from_path(image))
        except OSError as error:
            what = f"{bounded(str(image), 200)}: {error.strerror or error}"
            raise DataError(what, "pass the path of a picture") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", compress_level=1)
        image = buffer.getvalue()
    if not isinstance(image, bytes):
        raise DataError(f"{quoted(image)} is no image", IMAGES)
    return check_image(ImageRef.from_bytes(image, "the image"))


def answered(asker: Asker, pairs: Pairs) -> Answers:
    """Ask about each image, all its questions from one prefix."""
    rows = [answer for image, questions in pairs for answer in asker.ask(image, questions)]
    return Answers([{"question": row.question, "base": row.base, "tuned": row.tuned} for row in rows])


def demo(
    base_model: str | None = None,
    adapter: Any = None,
    port: int = PORT,
    max_new_tokens: int | None = None,
    allow_other_base: bool = False,
    max_length: int | None = None,
    oversized: str | None = None,
) -> Any:
    """Serve a page to this machine on which one uploads an image, asks, and compares base and tuned (extra `demo`).

    Args:
        base_model: "pocket", a folder or a Hub id; None for the one that the adapter names, or pocket.
        adapter: a `Run`, or the folder of an adapter; None asks the base alone.
        port: of the page.
        max_new_tokens: limit of an answer in tokens; None for that of the adapter or the base.
        allow_other_base: the base may be another one than the adapter was trained on.
        max_length, oversized: tokens of a question, and "scale" to scale pictures of longer ones down, or "keep"; None
            for what the adapter's training had.

    Returns:
        The gradio.Blocks, which is served already: `close()` ends it, `block_thread()` waits for Ctrl+C.

    Raises:
        RunError: Gradio is not installed, or the port cannot be used.
        ModelError: base or adapter cannot be found or do not fit.
    """
    require_gradio()
    with restored():
        return open_page(_opened(base_model, adapter, max_new_tokens, allow_other_base, max_length, oversized), port)


def _opened(base_model: str | None, adapter: Any, *settings: Any) -> Asker:
    """What answers: a base, and the adapter of a run."""
    folder = Path(adapter) if adapter is not None else None
    if folder is not None and artifacts.holds_full_model(folder):
        base_model, folder = str(folder), None
    return open_asker(base_model, folder, False, *settings)


def ask(
    images: Any,
    questions: str | Sequence[str],
    base_model: str | None = None,
    adapter: Any = None,
    max_new_tokens: int | None = None,
    allow_other_base: bool = False,
    max_length: int | None = None,
    oversized: str | None = None,
) -> Answers:
    """Load a model and ask it; `Run.ask` keeps the model loaded.

    Args:
        images: a picture (PIL, path, bytes, NumPy array of uint8), or as many pictures as there are questions; a list
            of pictures in the place of one shows them together.
        questions: one, or several; `<image>` in a question says where a picture stands, as in a plain record.
        base_model: "pocket", a folder or a Hub id; None for the one that the adapter names, or pocket.
        adapter: a `Run`, or the folder of an adapter; None asks the base alone.
        max_new_tokens: limit of an answer in tokens; None for that of the adapter or the base.
        allow_other_base: the base may be another one than the adapter was trained on.
        max_length, oversized: tokens of a question, and "scale" to scale pictures of longer ones down, or "keep"; None
            for what the adapter's training had.

    Raises:
        DataError: an image cannot be read, or images and questions do not pair.
        ModelError: base or adapter cannot be found or do not fit.

    Examples:
        >>> import vlm_sft
        >>> from PIL import Image
        >>> answers = vlm_sft.ask(Image.new("RGB", (64, 64), "red"), "What color is the picture?", base_model="pocket")
        >>> answers[0]["question"], answers[0]["tuned"]
        ('What color is the picture?', None)
    """
    pairs = pairs_of(images, questions)
    with restored():
        return answered(_opened(base_model, adapter, max_new_tokens, allow_other_base, max_length, oversized), pairs)

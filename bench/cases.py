"""The rows that every side of the throughput benchmark trains on, in each side's own file format."""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 7
CHARTQA_PIXELS = 200_704  # 256 image tokens of 28 x 28 pixels
NATIVE_PIXELS = 12_845_056  # the published bound: 16,384 image tokens
EASY_SIDE = 224  # pixels: 64 image tokens
DRAWN_SIZES, DRAWN_COLOURS = ((850, 600), (800, 557), (640, 480)), ("navy", "teal", "orange")
SYSTEM = "You are a helpful assistant."
TAKE_ANSWERS = ("PaliGemmaProcessor",)  # processors that put the answer behind the question themselves


@dataclass(frozen=True)
class Row:
    """One question: the image's file, the question and the answer."""

    image: str
    question: str
    answer: str


@dataclass(frozen=True)
class Case:
    """Which rows, and the bound on the area of an image in pixels.

    Attributes:
        name: on the command line.
        source: "chartqa", "easy_vqa", or "drawn": pictures of charts' sizes that are made here.
        max_pixels: bound on an image's area in pixels.
        one_an_image: keep the first question of each image only.
    """

    name: str
    source: str
    max_pixels: int = CHARTQA_PIXELS
    one_an_image: bool = False


CASES = {
    "chartqa": Case("chartqa", "chartqa"),
    "easy_vqa": Case("easy_vqa", "easy_vqa", EASY_SIDE * EASY_SIDE),
    "native": Case("native", "chartqa", NATIVE_PIXELS),
    "drawn": Case("drawn", "drawn", NATIVE_PIXELS),
    "k1": Case("k1", "chartqa", one_an_image=True),
}


def choose(groups: dict[str, list[tuple[str, str]]], questions: int, one_an_image: bool) -> dict[str, list[Any]]:
    """Draw whole images, with all their questions, until there are exactly so many questions.

    Args:
        groups: question and answer by image.
        questions: how many; an image whose questions are too many for what is left is passed over.
        one_an_image: take the first question of each image only.

    Raises:
        ValueError: there are not so many questions.
    """
    order = sorted(groups)
    random.Random(SEED).shuffle(order)
    chosen: dict[str, list[Any]] = {}
    left = questions
    for key in order:
        rows = groups[key][:1] if one_an_image else groups[key]
        if 0 < len(rows) <= left:
            chosen[key] = rows
            left -= len(rows)
    if left:
        raise ValueError(f"only {questions - left} of {questions} questions are there: ask for fewer")
    return chosen


def write(case: Case, questions: int, folder: Path, data: Path) -> list[Row]:
    """Write images and rows of a case, once.

    Args:
        case: which rows.
        questions: how many.
        folder: where to; gets images/, rows.json and a file for each side.
        data: folder of ChartQA's parquet files.

    Returns:
        The rows, the questions of an image next to each other.
    """
    path = folder / "rows.json"
    if not path.is_file():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        sources = {"chartqa": lambda: _chartqa(data), "easy_vqa": _easy_vqa, "drawn": lambda: _drawn(questions)}
        groups, images = sources[case.source]()
        rows = []
        for key, asked in choose(groups, questions, case.one_an_image).items():
            name = str(folder / "images" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.png")
            Path(name).write_bytes(images(key))
            rows += [Row(name, question, answer) for question, answer in asked]
        _write_formats(rows, folder)
        path.write_text(json.dumps([vars(row) for row in rows], indent=1, ensure_ascii=False), encoding="utf-8")
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _chartqa(data: Path) -> tuple[dict[str, list[tuple[str, str]]], Any]:
    """Questions by hash of the image's bytes, and what gives the bytes."""
    import pyarrow.parquet as parquet

    groups: dict[str, list[tuple[str, str]]] = {}
    images: dict[str, bytes] = {}
    for row in parquet.read_table(data / "train.parquet").to_pylist():
        content = row["image"]["bytes"]
        key = hashlib.sha256(content).hexdigest()
        images[key] = content
        label = row["label"]
        groups.setdefault(key, []).append((row["query"], label[0] if isinstance(label, list) else label))
    return groups, images.__getitem__


def _easy_vqa() -> tuple[dict[str, list[tuple[str, str]]], Any]:
    """Questions by image number, and what gives the image, scaled up, as PNG bytes."""
    import easy_vqa
    from PIL import Image

    texts, answers, numbers = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    groups: dict[str, list[tuple[str, str]]] = {}
    for text, answer, number in zip(texts, answers, numbers, strict=True):
        groups.setdefault(str(number), []).append((text, answer))

    def scaled(key: str) -> bytes:
        stream = io.BytesIO()
        picture = Image.open(paths[int(key)]).convert("RGB").resize((EASY_SIDE, EASY_SIDE), Image.Resampling.BICUBIC)
        picture.save(stream, "PNG")
        return stream.getvalue()

    return groups, scaled


def _drawn(questions: int) -> tuple[dict[str, list[tuple[str, str]]], Any]:
    """Two questions a picture about pictures of bars in sizes that charts have, and what gives their PNG bytes."""
    from PIL import Image, ImageDraw

    def drawn(key: str) -> bytes:
        random_ = random.Random(f"{SEED} {key}")
        picture = Image.new("RGB", random_.choice(DRAWN_SIZES), "white")
        pen = ImageDraw.Draw(picture)
        for bar in range(10):
            left, top = picture.width * bar // 10, random_.randrange(picture.height)
            pen.rectangle((left, top, left + picture.width // 14, picture.height), fill=random_.choice(DRAWN_COLOURS))
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()

    asked = [("Which bar is the highest one?", "the first"), ("How many bars are there?", "10")]
    return {str(number): asked for number in range(-(-questions // 2))}, drawn


def _write_formats(rows: list[Row], folder: Path) -> None:
    """One file a format: ours, conversations with <image> marks, and prompt with completion."""
    ours, turns, pairs = [], [], []
    for row in rows:
        ours.append({"image": row.image, "question": row.question, "answer": row.answer})
        turns.append(
            {
                "messages": [
                    {"role": "user", "content": f"<image>{row.question}"},
                    {"role": "assistant", "content": row.answer},
                ],
                "images": [row.image],
            }
        )
        pairs.append(
            {
                "prompt": [{"role": "user", "content": row.question}],
                "completion": [{"role": "assistant", "content": row.answer}],
                "images": [row.image],
            }
        )
    (folder / "ours").mkdir(exist_ok=True)
    write_lines(folder / "ours" / "train.jsonl", ours)
    # A data set without a validation file would have a tenth of its images held out.
    write_lines(folder / "ours" / "validation.jsonl", ours[:1])
    write_lines(folder / "conversations.jsonl", turns)
    write_lines(folder / "pairs.jsonl", pairs)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def expected_work(rows: list[Row], processor: Any, shared: bool = True) -> dict[str, int]:
    """What one epoch over the rows is when every question is a sequence of its own, told by the processor itself.

    Args:
        rows: the questions.
        processor: the family's.
        shared: whether the questions of an image can share it.

    Returns:
        `questions`, `images` (distinct), `tokens`, `image_tokens`, `supervised` (answer and end tokens), `patches`, and
        for sharing sides `distinct_patches` and `distinct_prefix_tokens` (each image once) and `own_tokens` (questions
        without the prefix).
    """
    from PIL import Image

    found = dict.fromkeys(
        ("tokens", "image_tokens", "supervised", "patches", "distinct_patches", "distinct_prefix_tokens", "own_tokens"),
        0,
    )
    seen: set[str] = set()
    end_id = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    for row in rows:
        with Image.open(row.image) as picture:
            inputs, answer = _encoded(row, picture.convert("RGB"), processor)
        ids = inputs["input_ids"][0].tolist()
        prefix = ids.index(end_id) + 1 if shared else 0
        patches = _patches(inputs["pixel_values"], inputs["input_ids"] == processor.image_token_id)
        found["tokens"] += len(ids)
        found["image_tokens"] += ids.count(processor.image_token_id)
        found["supervised"] += len(processor.tokenizer(answer)["input_ids"])
        found["patches"] += patches
        found["own_tokens"] += len(ids) - prefix
        if row.image not in seen:
            seen.add(row.image)
            found["distinct_patches"] += patches
            found["distinct_prefix_tokens"] += prefix
    return {"questions": len(rows), "images": len(seen), **found}


def _encoded(row: Row, picture: Any, processor: Any) -> tuple[Any, str]:
    """The model's inputs for a question with its answer, and the text that is supervised."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}]
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    if type(processor).__name__ in TAKE_ANSWERS:
        inputs = processor(text=[prompt], images=[picture], suffix=[row.answer], return_tensors="pt")
        return inputs, row.answer + processor.tokenizer.eos_token
    answer = [{"role": "assistant", "content": [{"type": "text", "text": row.answer}]}]
    whole = processor.apply_chat_template([*asked, *answer], tokenize=False)
    return processor(text=[whole], images=[picture], return_tensors="pt"), whole[len(prompt) :]


def _patches(pixels: Any, image_tokens: Any) -> int:
    """Patches of an image: rows of the pixels, or of a picture as a whole (B, C, H, W) one for each image token."""
    return int(pixels.shape[0] if pixels.ndim == 2 else image_tokens.sum())

"""Export pocket, score what was exported, write its card.

The exported folder is read back as any user reads it (AutoModelForImageTextToText, AutoProcessor) and answers held-out
questions by plain greedy generation. An answer counts when it equals the right one, letter case aside. The numbers of
the card come from scores.json and from nowhere else.
"""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tools.pocket import build, curriculum, words
from tools.pocket.card import CARD, SCORES, card
from vlm_sft.common import artifacts, console
from vlm_sft.data.demo.generate import demo_samples
from vlm_sft.data.images import decode_rgb

if TYPE_CHECKING:
    from tools.pocket.train import Run

BATCH = 16
QUESTIONS = 240


@dataclass(frozen=True, slots=True)
class Item:
    """One held-out question.

    Attributes:
        group: what it is counted in.
        image, question, answer: the picture, what is asked, the right answer.
        part: a part of the group that is also counted by itself; "" for none.
    """

    group: str
    image: Image.Image
    question: str
    answer: str
    part: str = ""


def lesson_items(lesson: str, count: int) -> list[Item]:
    """`count` held-out questions of a lesson of the curriculum, from as many pictures as that takes."""
    items: list[Item] = []
    for picture in curriculum.held_out_pictures(lesson, count):
        for question, answer in picture.questions:
            group, part = _line_group(question, answer) if lesson == "line" else (lesson, "")
            items.append(Item(group, Image.fromarray(picture.pixels), question, answer, part))
    return _thinned(items, count)


def _line_group(question: str, answer: str) -> tuple[str, str]:
    """Group and part of a question about one line of text."""
    if question.casefold() not in {wording.casefold() for wording in curriculum.READ_LINE}:
        return "letters and colours of words", ""
    if answer[0].isdigit():
        return "numbers", ""
    return "words", "that exist" if words.is_listed(answer) else "made-up ones, plates and prices"


def demo_items(kind: str, count: int) -> list[Item]:
    """The first `count` questions of the test split of a synthetic benchmark."""
    return [
        Item(kind, decode_rgb(image.load(), image.source), sample.question, sample.target)
        for sample in demo_samples(kind, "test", count)
        for image in sample.images
    ]


def _thinned(items: list[Item], count: int) -> list[Item]:
    """At most `count` items of every group, spread evenly."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return [
        members[index * len(members) // min(count, len(members))]
        for members in groups.values()
        for index in range(min(count, len(members)))
    ]


def answers(model: Any, processor: Any, items: Sequence[Item]) -> list[str]:
    """Answer questions greedily, in batches of pictures of about one size.

    Args:
        model: a Qwen2.5-VL in evaluation mode.
        processor: its processor, padding on the left.
        items: the questions.
    """
    order = sorted(range(len(items)), key=lambda index: items[index].image.size)
    found = [""] * len(items)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        texts = [_prompt(processor, items[index].question) for index in chosen]
        inputs = processor(
            text=texts,
            images=[items[index].image for index in chosen],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=build.MAX_NEW_TOKENS, do_sample=False)
        replies = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, reply in zip(chosen, replies, strict=True):
            found[index] = reply.strip()
    return found


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def accuracies(model: Any, processor: Any, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Share of right answers by group and by part of a group, with its number of questions and its half 95 % interval.

    The interval is the normal approximation for independent questions; questions of one picture are not quite
    independent.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for item, reply in zip(items, answers(model, processor, items), strict=True):
        right = reply.casefold() == item.answer.casefold()
        hits[item.group].append(right)
        if item.part:
            hits[f"{item.group}: {item.part}"].append(right)
    scores = {}
    for group, found in hits.items():
        share = sum(found) / len(found)
        scores[group] = {
            "n": len(found),
            "accuracy": round(share, 4),
            "plus_minus": round(1.96 * math.sqrt(share * (1 - share) / len(found)), 4),
        }
    return scores


def load(folder: Path) -> tuple[Any, Any]:
    """Open a shipping folder as a user does: the model in float32, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def export(run: Run, folder: Path, note: str = "", questions: int = QUESTIONS) -> dict[str, Any]:
    """Write a shipping folder from a run, score it, and write scores.json and the card.

    Args:
        run: new, resumed or finished.
        folder: see `build.save_folder`.
        note: what the card says about this run besides; "" for nothing.
        questions: how many a group has at most.

    Returns:
        What scores.json says.

    Raises:
        RunError: the folder cannot be written.
    """
    build.save_folder(run.average, folder, run.head)
    model, processor = load(folder)
    lessons = ("line", "sign", "board", "listing", "shapes", "chart")
    items = [item for lesson in lessons for item in lesson_items(lesson, questions)]
    items += [item for kind in ("demo_charts", "demo_text") for item in demo_items(kind, questions)]
    record: dict[str, Any] = {
        "schema": 1,
        "training": {
            "steps": run.step,
            "planned_steps": run.total,
            "finished": bool(run.total) and run.step >= run.total,
            "pictures": run.pictures,
            "questions": run.questions,
            "minutes": round(run.seconds / 60, 1),
            "seed": run.seed,
            "threads": run.threads,
        },
        "model": {"parameters": model.num_parameters(), "weights_bytes": (folder / "model.safetensors").stat().st_size},
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rule": "greedy; equal to the right answer, letter case aside",
        "note": note,
        "scores": accuracies(model, processor, items),
    }
    artifacts.write_json(folder / SCORES, record)
    artifacts.write_text_atomic(folder / CARD, card(record))
    for group, score in record["scores"].items():
        console.say(f"{group}: {score['accuracy']:.3f} of {score['n']}")
    return record

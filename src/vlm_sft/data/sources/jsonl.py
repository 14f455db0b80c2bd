"""Your own data: JSON lines (or a JSON list) and image files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import parse_json, writable
from vlm_sft.common.errors import DataError
from vlm_sft.data.boxes import box_outside, widest
from vlm_sft.data.images import check_image
from vlm_sft.data.sample import OUTSIDE, UNREADABLE, ImageRef, LeftOut, Sample
from vlm_sft.data.sources.foreign import refuse_compressed
from vlm_sft.data.sources.locate import StoredImage, lies_outside, locate_image
from vlm_sft.data.sources.records import Question, questions_of, require_image
from vlm_sft.data.sources.rows import RowProblem, clean_text, finish_split, left_out
from vlm_sft.data.sources.shards import parquet_records
from vlm_sft.data.sources.spec import JSON_SUFFIXES, DatasetSpec
from vlm_sft.data.sources.splits import (
    HOLD_OUT_FRACTION,
    SPLIT_WORDS,
    LoadedSplit,
    files_by_split,
    folder_files,
    plan_split,
    split_of_name,
)
from vlm_sft.data.threads import map_images


@dataclass(frozen=True, slots=True)
class Line:
    """One question and the place it comes from.

    Attributes:
        id: sample id.
        where: "file line 12", for messages.
        folder: the folder that image paths are relative to.
        part: the split for reporting, or a word like "train" that assigns the line to a split.
        question: the parsed question.
    """

    id: str
    where: str
    folder: Path
    part: str
    question: Question


def load(spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of your own data; every image is fully decoded once.

    Files are assigned to splits by their names (train, val/validation/dev, test), lines by a "split" key with such a
    value. Where there is no validation part, a tenth of the images is held out of train, always the same, and another
    tenth where there is no test part either.

    Args:
        spec: its path is a .jsonl, .json or .parquet file, or a folder of them.
        split: "train", "validation" or "test".

    Raises:
        DataError: a file cannot be read, or not one line can be used.
    """
    assert spec.path is not None
    files = _split_files(spec.path)
    lines: dict[str, list[Line]] = {}
    left: dict[str, list[LeftOut]] = {}
    for file_split, paths in files.items():
        for path in paths:
            _read_file(spec, path, file_split, lines, left)
    available = [name for name in {*lines, *left} if lines.get(name) or name in files]
    plan = plan_split(available, split, str(spec.path))
    chosen = lines.get(plan.source, [])
    images = _read_images(chosen)
    samples, unread = _samples(spec, chosen, images)
    gone = left.get(plan.source, []) + unread
    origin = f"{spec.name} {plan.source} from {spec.path}"
    return finish_split(plan, samples, gone, HOLD_OUT_FRACTION, origin)


def answer_texts(spec: DatasetSpec) -> tuple[list[str], set[str]]:
    """What the answers of own data look like, over all its splits; no image is read.

    Returns:
        The answer of every question that is learned, and all different answers that are accepted.

    Raises:
        DataError: a file cannot be read.
    """
    assert spec.path is not None
    lines: dict[str, list[Line]] = {}
    for split, paths in _split_files(spec.path).items():
        for path in paths:
            _read_file(spec, path, split, lines, {})
    questions = [line.question for part in lines.values() for line in part]
    accepted = {answer for question in questions for answer in (question.target, *question.answers)}
    boxed = [widest(question.target) if question.boxes else question.target for question in questions]
    return boxed, accepted


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Files by split; beside a single train file its siblings count ("x_train.jsonl" -> "x_val.jsonl")."""
    endings: tuple[str, ...] = JSON_SUFFIXES
    if path.is_dir():  # .json files beside others are mostly settings
        there = {file.suffix for file in folder_files(path)}
        endings = next(((ending,) for ending in (".jsonl", ".parquet") if ending in there), endings)
    files = files_by_split(path, endings)
    if path.is_dir() or split_of_name(path.name) != "train":
        return files
    for word, split in SPLIT_WORDS.items():
        sibling = path.with_name(re.sub("train(ing)?", word, path.name, count=1, flags=re.IGNORECASE))
        if split != "train" and split not in files and sibling.is_file():
            files[split] = [sibling]
    return files


def _read_file(
    spec: DatasetSpec, path: Path, file_split: str, lines: dict[str, list[Line]], left: dict[str, list[LeftOut]]
) -> None:
    """Parse one file into `lines` and `left`, by split."""
    used: Counter[str] = Counter()
    root = spec.path if spec.path and spec.path.is_dir() else path.parent
    tag = writable("/".join(path.relative_to(root).with_suffix("").parts))
    lines.setdefault(file_split, [])
    for number, label, record in records_of_file(path):
        where, base = f"{path} {label} {number}", f"{spec.name}/{tag}/{number:06d}"
        try:
            if isinstance(record, RowProblem):
                raise record
            questions = require_image(record, partial(questions_of, record))
            part = _part(record)
            base = _record_id(spec.name, record, base, used)
        except RowProblem as problem:
            left.setdefault(file_split, []).append(left_out(base, where, problem))
            continue
        split = SPLIT_WORDS.get(part.lower(), file_split)
        for question in questions:
            turn_id = base if len(questions) == 1 else f"{base}/turn{question.turn}"
            if question.problem:
                left.setdefault(split, []).append(left_out(turn_id, where, question.problem))
            else:
                lines.setdefault(split, []).append(Line(turn_id, where, path.parent, part, question))


def records_of_file(path: Path, pictures: Sequence[str] = ()) -> Iterator[tuple[int, str, Any]]:
    """Yield number, "line", "item" or "row", and the record or the RowProblem that stands in for it.

    Args:
        path: JSON lines, a JSON list, or parquet, whose images stay in the file as `StoredImage`.
        pictures: columns of parquet that hold images besides those of the usual names.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix == ".parquet":
        for number, row in enumerate(parquet_records(path, pictures)):
            yield number, "row", row
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    refuse_compressed(path, data[:6])
    data = data.removeprefix(b"\xef\xbb\xbf")
    whole = _whole_document(path, data)
    if whole is not None:
        for number, record in enumerate(whole, start=1):
            yield number, "item", record
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, "line", parse_json(line.decode("utf-8"), strict=False, unique=True)
        except UnicodeDecodeError as error:
            yield number, "line", RowProblem("line is not UTF-8", str(error))
        except ValueError as error:
            yield number, "line", RowProblem("broken JSON line", f"not JSON: {error}")


def _whole_document(path: Path, data: bytes) -> list[Any] | None:
    """The records of a file that is one JSON list (or one object over several lines); None for JSON lines."""
    if not data.lstrip().startswith(b"[") and path.suffix != ".json":
        return None
    try:
        document = parse_json(data.decode("utf-8"), strict=False, unique=True)
    except ValueError as error:
        if data.lstrip().startswith(b"["):
            raise DataError(f"{path} is not JSON: {error}", "correct the file, or write one record a line") from error
        return None
    return document if isinstance(document, list) else [document]


def _record_id(name: str, record: dict[str, Any], numbered: str, used: Counter[str]) -> str:
    """The record's own id where it has one; an id used before falls back to the line number."""
    own = record.get("id")
    if not isinstance(own, (str, int)) or isinstance(own, bool) or not str(own).strip():
        return numbered
    own = clean_text(own, "id")
    used[own] += 1
    return f"{name}/{own}" if used[own] == 1 else f"{numbered}:{own}"


def _part(record: dict[str, Any]) -> str:
    part = record.get("split")
    return clean_text(part, "split") if isinstance(part, str) and part.strip() else ""


def _read_images(lines: list[Line]) -> dict[tuple[Path, str], ImageRef | RowProblem]:
    """Read, hash and decode each different image once, in threads."""
    wanted: dict[tuple[Path, str], Any] = {}
    for line in lines:
        for image in line.question.images:
            wanted.setdefault(_image_id(line.folder, image), image)
    results = map_images(
        lambda item: _read_image(item[0][0], item[1]), wanted.items(), len(wanted), "checking your images"
    )
    return dict(zip(wanted, results, strict=True))


def _image_id(folder: Path, image: Any) -> tuple[Path, str]:
    if isinstance(image, StoredImage):
        return folder, image.source
    return folder, image if isinstance(image, str) else json.dumps(image, sort_keys=True)


def _read_image(folder: Path, image: Any) -> ImageRef | RowProblem:
    try:
        return check_image(locate_image(folder, image))
    except RowProblem as problem:
        return problem
    except DataError as error:
        return RowProblem(UNREADABLE, error.what)


def _box_size(question: Question, images: Sequence[ImageRef]) -> tuple[int, int] | None:
    """Width and height in pixels that the boxes of a question are within; None where it declares none.

    Raises:
        RowProblem: one is not.
    """
    if not question.boxes:
        return None
    (image,) = images
    size = (image.width, image.height)
    texts = (question.question, *question.answers, question.target, *(turn.text for turn in question.history))
    outside = box_outside(texts, size)
    if outside:
        raise RowProblem("box outside of its image", f"{outside} in {image.source} ({size[0]} x {size[1]} pixels)")
    return size


def _samples(
    spec: DatasetSpec, lines: list[Line], images: dict[tuple[Path, str], ImageRef | RowProblem]
) -> tuple[list[Sample], list[LeftOut]]:
    assert spec.path is not None
    samples: list[Sample] = []
    left: list[LeftOut] = []
    root = spec.path if spec.path.is_dir() else spec.path.parent
    outside = {ref.source for ref in images.values() if isinstance(ref, ImageRef) and lies_outside(ref, root)}
    for line in lines:
        question = line.question
        refs = []
        try:
            for image in question.images:
                ref = images[_image_id(line.folder, image)]
                if isinstance(ref, RowProblem):
                    raise ref
                refs.append(ref)
            boxes = _box_size(question, refs)
        except RowProblem as problem:
            left.append(left_out(line.id, line.where, problem))
            continue
        part = "" if line.part.lower() in SPLIT_WORDS else line.part
        metadata: dict[str, Any] = {"where": line.where}
        if outside and (away := [ref.source for ref in refs if ref.source in outside]):
            metadata[OUTSIDE] = away
        samples.append(
            Sample(
                line.id,
                spec.name,
                part,
                tuple(refs),
                question.question,
                question.target,
                question.answers,
                question.history,
                question.system,
                metadata,
                question.weight,
                question.places,
                boxes,
            )
        )
    return samples, left

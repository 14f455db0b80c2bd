"""Your own data: files of records, in any of the kinds of `readers`, and their images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import writable
from vlm_sft.common.errors import DataError, nearest, quoted
from vlm_sft.data.boxes import box_outside, widest
from vlm_sft.data.images import check_image
from vlm_sft.data.sample import OUTSIDE, RECORD, UNREADABLE, ImageRef, LeftOut, Sample
from vlm_sft.data.sources.columns import KEYS_TOLD, has_of
from vlm_sft.data.sources.files import data_files, root_of
from vlm_sft.data.sources.locate import StoredImage, lies_outside, locate_image
from vlm_sft.data.sources.readers import records_of_file, require_table
from vlm_sft.data.sources.records import Question, questions_of, require_image
from vlm_sft.data.sources.rows import RowProblem, clean_text, finish_split, left_out, other_values
from vlm_sft.data.sources.spec import HUB, DatasetSpec
from vlm_sft.data.sources.splits import HOLD_OUT_FRACTION, SPLIT_WORDS, LoadedSplit, plan_split
from vlm_sft.data.sources.stream import split_stream
from vlm_sft.data.threads import map_images

LOOKED_AT = 1000  # rows of a streamed set that say how long its answers are


@dataclass(frozen=True, slots=True)
class Line:
    """One question and the place it comes from.

    Attributes:
        id: sample id.
        where: "file line 12", for messages.
        folder: the folder that image paths are relative to.
        part: the split for reporting, or a word like "train" that assigns the line to a split.
        question: the parsed question.
        record: what else its record holds; empty in training data.
    """

    id: str
    where: str
    folder: Path
    part: str
    question: Question
    record: Mapping[str, Any] = field(default_factory=dict)


def load(spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of your own data; every image is fully decoded once.

    Files are assigned to splits by their names (train, val/validation/dev, test), lines by a "split" key with such a
    value. Where there is no validation part, a tenth of the images is held out of train, always the same, and another
    tenth where there is no test part either.

    Args:
        spec: its path is a file, a folder or a pattern, as of `data_files`.
        split: "train", "validation" or "test".

    Raises:
        DataError: a file cannot be read, or not one line can be used.
    """
    files = _files(spec, split)
    lines, left = _read_all(spec, files, keep_records=split != "train")
    available = [name for name in {*lines, *left} if lines.get(name) or name in files]
    place = f"{HUB}{spec.hub}" if spec.hub else str(spec.path)
    plan = plan_split(_fetchable(spec) if spec.stream is not None else available, split, place)
    chosen = lines.get(plan.source, [])
    images = _read_images(chosen)
    samples, unread = _samples(spec, chosen, images)
    gone = left.get(plan.source, []) + unread
    origin = f"{spec.name} {plan.source} from {place}"
    if spec.stream is not None:
        origin += f" (streamed: its first rows, {spec.stream:,} at most, mixed within a buffer)"
        plan, samples = split_stream(plan, samples, HOLD_OUT_FRACTION)
    return finish_split(plan, samples, gone, HOLD_OUT_FRACTION, origin)


def answer_texts(spec: DatasetSpec) -> tuple[list[str], set[str]]:
    """What the answers of own data look like, over all its splits; no image is read.

    Of a set that is streamed the first `LOOKED_AT` rows of each split are looked at.

    Returns:
        The answer of every question that is learned, and all different answers that are accepted.

    Raises:
        DataError: a file cannot be read.
    """
    if spec.stream is not None:
        spec = replace(spec, stream=LOOKED_AT)
    lines, _ = _read_all(spec, _files(spec, None))
    questions = [line.question for part in lines.values() for line in part]
    accepted = {answer for question in questions for answer in (question.target, *question.answers)}
    boxed = [widest(question.target) if question.boxes else question.target for question in questions]
    return boxed, accepted


def _files(spec: DatasetSpec, split: str | None) -> dict[str, list[Path]]:
    """The files of own data by split; of a set that is streamed only those that `split` is made of, None for all."""
    if not spec.hub:
        assert spec.path is not None
        return data_files(spec.path)
    from vlm_sft.data.sources import hub_sets

    if spec.stream is None:
        files = hub_sets.hub_files(spec.hub)
    else:
        names = hub_sets.hub_splits(spec.hub)
        wanted = names if split is None else [plan_split(names, split, f"{HUB}{spec.hub}").source]
        files = {name: hub_sets.streamed_files(spec.hub, names[name], spec.stream) for name in wanted}
    require_table(next(iter(files.values()))[0], spec.columns, spec.alone, f"{HUB}{spec.hub}")
    return files


def _fetchable(spec: DatasetSpec) -> list[str]:
    """The splits that a streamed set has, whether they were fetched or not."""
    from vlm_sft.data.sources.hub_sets import hub_splits

    return list(hub_splits(spec.hub))


def _read_all(
    spec: DatasetSpec, files: dict[str, list[Path]], keep_records: bool = False
) -> tuple[dict[str, list[Line]], dict[str, list[LeftOut]]]:
    """Parse the files of own data: its lines and what was left out, each by split.

    Raises:
        DataError: a file cannot be read, or a column of `--columns` is in none of them.
    """
    lines: dict[str, list[Line]] = {}
    left: dict[str, list[LeftOut]] = {}
    seen: set[str] = set()
    for file_split, paths in files.items():
        for path in paths:
            _read_file(spec, path, file_split, lines, left, seen, keep_records)
    gone = next((theirs for theirs in spec.columns.values() if theirs not in seen), None)
    if gone is not None and spec.alone and any([*lines.values(), *left.values()]):
        raise DataError(
            f"--columns: no record of {spec.path} has the key {quoted(gone)}{nearest(gone, seen)} (they have: "
            f"{has_of(sorted(seen)[:KEYS_TOLD])})",
            "name a key that is there, or leave this one out",
        )
    return lines, left


def _read_file(
    spec: DatasetSpec,
    path: Path,
    file_split: str,
    lines: dict[str, list[Line]],
    left: dict[str, list[LeftOut]],
    seen: set[str],
    keep_records: bool,
) -> None:
    """Parse one file into `lines` and `left`, by split."""
    used: Counter[str] = Counter()
    root = root_of(spec.path) if spec.path else path.parent
    tag = writable("/".join(path.relative_to(root).with_suffix("").parts))
    lines.setdefault(file_split, [])
    shown = f"{HUB}{spec.hub} {path.stem}" if spec.hub else str(path)
    for number, label, record in records_of_file(path, spec.columns, spec.alone, checked=not spec.hub, seen=seen):
        where, base = f"{shown} {label} {number}", f"{spec.name}/{tag}/{number:06d}"
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
        rest = other_values(record) if keep_records else {}
        for question in questions:
            turn_id = base if len(questions) == 1 else f"{base}/turn{question.turn}"
            if question.problem:
                left.setdefault(split, []).append(left_out(turn_id, where, question.problem))
            else:
                lines.setdefault(split, []).append(Line(turn_id, where, path.parent, part, question, rest))


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


def _homes(spec: DatasetSpec) -> tuple[Path, ...]:
    """The folders that the images of own data belong in: that of its files, or the caches of the Hub."""
    if spec.path is not None:
        return (root_of(spec.path),)
    import datasets

    return (
        Path(datasets.config.HF_CACHE_HOME),
        Path(datasets.config.HF_DATASETS_CACHE),
        Path(spec.hub.partition(":")[0]),
    )


def _box_size(question: Question, images: list[ImageRef]) -> tuple[int, int] | None:
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
    samples: list[Sample] = []
    left: list[LeftOut] = []
    homes = _homes(spec)
    outside = {ref.source for ref in images.values() if isinstance(ref, ImageRef) and lies_outside(ref, *homes)}
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
        if line.record:
            metadata[RECORD] = line.record
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

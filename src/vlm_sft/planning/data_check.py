"""A data set checked without training: everything read, every image decoded, counts and a preview written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from vlm_sft.common import artifacts
from vlm_sft.common.console import say, warn
from vlm_sft.common.errors import DataError, bounded
from vlm_sft.data.audit import AuditReport, audit, check_images, enforce
from vlm_sft.data.dataset import usable_samples
from vlm_sft.data.duplicates import CONTRADICTION, DUPLICATE, Repeat, find_repeats
from vlm_sft.data.mixture import mix
from vlm_sft.data.oversized import LengthRule, Oversized, fit, lines, to_json
from vlm_sft.data.plain_text import reads_like_control
from vlm_sft.data.preview import count_rows, render_preview
from vlm_sft.data.sample import OUTSIDE, LeftOut, Sample
from vlm_sft.data.sources.registry import SPLITS, load_split
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets
from vlm_sft.data.sources.splits import MissingSplitError
from vlm_sft.planning.options import CheckRequest

PREVIEW = "preview.html"
DRAW_SEED = 0
STRIP_RATIO = 200  # of the sides of an image, above which the processors of the Qwen families raise
EXAMPLES = 3  # repeated questions of each kind that are printed


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What a check found; the same is in the files of its folder.

    Attributes:
        folder: holds data.json, left_out.jsonl, repeats.jsonl, preview.html and, where there are any, oversized.jsonl.
        report: counts of the samples that can be used.
        left_out: those that cannot.
        repeats: questions that are asked again of the same image.
        oversized: samples of more tokens than `max_length`.
    """

    folder: Path
    report: AuditReport
    left_out: list[LeftOut]
    repeats: list[Repeat]
    oversized: list[Oversized]

    @property
    def preview(self) -> Path:
        """A page with pictures, questions and answers."""
        return self.folder / PREVIEW

    def _repr_html_(self) -> str:
        """The counts as a table in a notebook."""
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in self.counts)
        return f"<table>{rows}</table><p>{escape(str(self.preview))}</p>"

    @property
    def counts(self) -> list[tuple[str, str]]:
        """Names and values of the counts."""
        return list(count_rows(self.report))


def check_data(request: CheckRequest) -> DataCheck:
    """Check a data set; the files are written even when too much is left out.

    Raises:
        DataError: the data cannot be read, or more is left out than `max_left_out` allows.
        RunError: the output folder cannot be written.
    """
    enforce([], 0, request.max_left_out)  # refuses a wrong fraction before the long work
    if request.limit is not None and request.limit < 1:
        raise DataError(f"--limit {request.limit} is below 1", "give a number of questions, or leave it out")
    specs = parse_datasets(request.dataset, request.columns)
    parts, left_out, descriptions, synthetic = _load(specs, request.split, request.limit)
    loaded = sum(len(part) for _, part in parts) + len(left_out)
    drawn = mix(parts, request.limit, DRAW_SEED)  # whole images, so that questions per image stay true
    if request.limit is not None:
        descriptions.append(f"checked here: a seeded sample of {len(drawn):,} questions")
    for line in descriptions:
        say(line)
    samples, unusable, holds_control, too_long = _usable(drawn, request.base_model, request.max_length, request.split)
    left_out += unusable
    repeats = find_repeats(samples)
    report = audit(samples, left_out, loaded, repeats=repeats, holds_control=holds_control)
    folder = request.output_dir or Path("outputs", "data_check", "+".join(s.name for s in specs) + f"-{request.split}")
    about = {
        "dataset": request.dataset,
        "split": request.split,
        "limit": request.limit,
        "descriptions": descriptions,
        "synthetic": synthetic,
    }
    data = artifacts.write_json(folder / artifacts.DATA, about | report.to_json())
    gone = artifacts.write_jsonl(
        folder / artifacts.LEFT_OUT, ({"id": i.id, "reason": i.reason, "detail": i.detail} for i in left_out)
    )
    if too_long:
        artifacts.write_jsonl(folder / artifacts.OVERSIZED, map(to_json, too_long))
    again = artifacts.write_jsonl(folder / artifacts.REPEATS, (repeat.to_json() for repeat in repeats))
    page = render_preview(request.dataset, descriptions, samples, left_out, report)
    preview = artifacts.write_text_atomic(folder / PREVIEW, page)
    _print_counts(report)
    say(f"counts: {data}\nleft out: {gone}\nrepeated questions: {again}\npreview with pictures: {preview}")
    _warn_of_repeats(repeats)
    _warn_of_places(samples)
    enforce(unusable, len(drawn), request.max_left_out, gone)
    enforce(left_out, loaded, request.max_left_out, gone)
    return DataCheck(folder, report, left_out, repeats, too_long)


def _usable(
    drawn: list[Sample], base_model: str | None, max_length: int | None, split: str
) -> tuple[list[Sample], list[LeftOut], Callable[[Sample], bool], list[Oversized]]:
    """Decode every image and, where a model is named, ask its processor.

    Returns:
        The samples that can be used, the others, what tells whether a text holds the name of a control token, and the
        samples that are longer than `max_length` or the model's context.

    Raises:
        DataError: `max_length` is below 1, or there is no model to count tokens with.
    """
    if max_length is not None and (max_length < 1 or base_model is None):
        raise DataError(
            f"--max_length {max_length} is {'below 1' if base_model else 'without a tokenizer'}",
            "pass --base_model MODEL and a number of tokens",
        )
    samples, unusable = check_images(drawn)
    if base_model is None:
        _warn_of_strips(samples)
        return samples, unusable, reads_like_control, []
    from vlm_sft.model.encoding import encoder_of  # PyTorch, which no other check needs
    from vlm_sft.model.load import find_base

    base = find_base(base_model)
    encoder = encoder_of(base)
    samples, refused = usable_samples(encoder, samples)
    rule = LengthRule(max_length, base.context)
    too_long = fit(samples, encoder, rule, split).found
    for line in lines(too_long, rule, len(samples), split):
        warn(line)
    return samples, unusable + refused, encoder.holds_control, too_long


def _load(
    specs: list[DatasetSpec], split: str, limit: int | None
) -> tuple[list[tuple[DatasetSpec, list[Sample]]], list[LeftOut], list[str], bool]:
    """Load the asked splits of all data sets, without weights; a fallback that repeats a split is counted once."""
    parts: list[tuple[DatasetSpec, list[Sample]]] = []
    left_out: dict[str, LeftOut] = {}
    descriptions: list[str] = []
    synthetic = False
    for spec in specs:
        samples: dict[str, Sample] = {}
        for name in SPLITS if split == "all" else (split,):
            try:
                loaded = load_split(spec, name, at_most=limit)
            except MissingSplitError:
                if split != "all":
                    raise
                continue
            samples |= {sample.id: sample for sample in loaded.samples}
            left_out |= {item.id: item for item in loaded.left_out}
            descriptions.append(loaded.description)
            synthetic |= loaded.synthetic
        parts.append((replace(spec, weight=None), list(samples.values())))
    return parts, list(left_out.values()), descriptions, synthetic


def _warn_of_strips(samples: list[Sample]) -> None:
    """Tell images so long and narrow that processors refuse them; which ones do is asked with --base_model."""
    strips = {
        image.key: image
        for sample in samples
        for image in sample.images
        if max(image.width, image.height) > STRIP_RATIO * min(image.width, image.height)
    }
    if strips:
        first = next(iter(strips.values()))
        warn(
            f"images more than {STRIP_RATIO} times as long as wide, which some models reject (all Qwen models): "
            f"{len(strips):,}, e.g. {first.source} ({first.width:,} x {first.height:,} pixels); --base_model MODEL "
            "checks with the model's processor"
        )


def _warn_of_repeats(repeats: list[Repeat]) -> None:
    """Tell questions that come again, contradictions first: of those no model can learn both answers."""
    for kind, what in (
        (CONTRADICTION, "asked again of the same image, with another answer"),
        (DUPLICATE, "asked again of the same image, with the same answer"),
    ):
        found = [repeat for repeat in repeats if repeat.kind == kind]
        if found:
            examples = "".join(f"\n  {repeat}" for repeat in found[:EXAMPLES])
            warn(f"questions {what}: {len(found):,}; the first:{examples}")


def _warn_of_places(samples: list[Sample]) -> None:
    """Tell the images that lie outside of the data's folder: whoever takes the folder does not have them."""
    away = {path for sample in samples for path in sample.metadata.get(OUTSIDE, ())}
    if away:
        what = "images that lie outside of the data's folder, by their path or a link"
        warn(f"{what}: {len(away):,}; the first: {min(away)}")


def _print_counts(report: AuditReport) -> None:
    """Print the counts and the histogram of questions per image as plain columns."""
    for name, value in count_rows(report):
        say(f"  {bounded(name):<36} {value:>24}")
    most = max(report.questions_per_image.values(), default=1)
    say("  questions per image (k): images")
    for k, images in report.questions_per_image.items():
        say(f"  {k:>6} {images:>9,} {'#' * max(1, round(40 * images / most))}")

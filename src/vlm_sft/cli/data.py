"""`vlm-sft data`: `check` loads a data set and writes a preview; `import`, `export`, `cache` are beside it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_sft.cli.data_cache import add_cache_arguments, run_cache
from vlm_sft.cli.data_exchange import add_exchange_arguments, run_export, run_import
from vlm_sft.common.errors import bounded
from vlm_sft.data.sources.spec import COLUMNS_HELP

if TYPE_CHECKING:
    from vlm_sft.data.audit import AuditReport
    from vlm_sft.data.duplicates import Repeat
    from vlm_sft.data.oversized import Oversized
    from vlm_sft.data.sample import LeftOut, Sample
    from vlm_sft.data.sources.spec import DatasetSpec

HELP = "check a data set, import and export other programs' data sets, list and clear the cache of prepared data"
CHECK_HELP = "check a data set without training: read everything, decode every image, write a preview"
PREVIEW = "preview.html"
DRAW_SEED = 0
STRIP_RATIO = 200  # of the sides of an image, above which the processors of the Qwen families raise
EXAMPLES = 3  # repeated questions of each kind that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_cache_arguments(actions)
    add_exchange_arguments(actions)
    check = actions.add_parser("check", help=CHECK_HELP, description=CHECK_HELP)
    check.add_argument(
        "dataset",
        metavar="DATASET",
        help="NAME[@PATH][:WEIGHT], comma separated: chartqa, textvqa, "
        "easy_vqa, demo, chartqa@FOLDER of parquet, your own data as of vlm-sft train, or hub:ORG/NAME",
    )
    check.add_argument("--columns", metavar="NAME=COLUMN,…", help=COLUMNS_HELP)
    check.add_argument(
        "--split",
        default="train",
        choices=("train", "validation", "test", "all"),
        help="which split to check (default: train)",
    )
    check.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="folder to write to (default: outputs/data_check/NAME-SPLIT)"
    )
    check.add_argument(
        "--base_model",
        metavar="MODEL",
        help="Hub id, folder, or 'pocket': also look for images and texts that this model's processor cannot take",
    )
    check.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="with --base_model: name the samples of more than N tokens (default: what the model's positions reach)",
    )
    check.add_argument("--limit", type=int, metavar="N", help="check a seeded sample of at most N questions")
    check.add_argument(
        "--max_left_out",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="share of samples that may be unusable, 0 to 1 (default: 0.01)",
    )


def run(args: argparse.Namespace) -> int:
    """Run one action of `data`; see the function of each for what it raises."""
    return {"cache": run_cache, "import": run_import, "export": run_export, "check": _check}[args.action](args)


def _check(args: argparse.Namespace) -> int:
    """Run `data check`; the files are written even when too much is left out.

    Raises:
        DataError: the data cannot be read, or more is left out than `--max_left_out` allows.
        RunError: the output folder cannot be written.
    """
    from vlm_sft.common.artifacts import DATA, LEFT_OUT, OVERSIZED, REPEATS, write_json, write_jsonl, write_text_atomic
    from vlm_sft.common.console import say
    from vlm_sft.common.errors import DataError
    from vlm_sft.data.audit import audit, enforce
    from vlm_sft.data.duplicates import find_repeats
    from vlm_sft.data.mixture import mix
    from vlm_sft.data.oversized import to_json
    from vlm_sft.data.preview import render_preview
    from vlm_sft.data.sources.spec import parse_datasets

    enforce([], 0, args.max_left_out)  # refuses a wrong fraction before the long work
    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit {args.limit} is below 1", "give a number of questions, or leave it out")
    specs = parse_datasets(args.dataset, args.columns)
    parts, left_out, descriptions, synthetic = _load(specs, args.split, args.limit)
    loaded = sum(len(part) for _, part in parts) + len(left_out)
    drawn = mix(parts, args.limit, DRAW_SEED)  # whole images, so that questions per image stay true
    if args.limit is not None:
        descriptions.append(f"checked here: a seeded sample of {len(drawn):,} questions")
    for line in descriptions:
        say(line)
    samples, unusable, holds_control, too_long = _usable(drawn, args.base_model, args.max_length, args.split)
    left_out += unusable
    repeats = find_repeats(samples)
    report = audit(samples, left_out, loaded, repeats=repeats, holds_control=holds_control)
    folder = args.output_dir or Path("outputs", "data_check", "+".join(s.name for s in specs) + f"-{args.split}")
    about = {
        "dataset": args.dataset,
        "split": args.split,
        "limit": args.limit,
        "descriptions": descriptions,
        "synthetic": synthetic,
    }
    data = write_json(folder / DATA, about | report.to_json())
    gone = write_jsonl(folder / LEFT_OUT, ({"id": i.id, "reason": i.reason, "detail": i.detail} for i in left_out))
    if too_long:
        write_jsonl(folder / OVERSIZED, map(to_json, too_long))
    again = write_jsonl(folder / REPEATS, (repeat.to_json() for repeat in repeats))
    page = render_preview(args.dataset, descriptions, samples, left_out, report)
    preview = write_text_atomic(folder / PREVIEW, page)
    _print_counts(report)
    say(f"counts: {data}\nleft out: {gone}\nrepeated questions: {again}\npreview with pictures: {preview}")
    _warn_of_repeats(repeats)
    _warn_of_places(samples)
    enforce(unusable, len(drawn), args.max_left_out, gone)
    enforce(left_out, loaded, args.max_left_out, gone)
    recipe = f"--sft_config smoketest{f' --base_model {shlex.quote(args.base_model)}' if args.base_model else ''}"
    named = f" --columns {shlex.quote(args.columns)}" if args.columns else ""
    say(f"next: vlm-sft train {recipe} --dataset {shlex.quote(args.dataset)}{named} --output_dir outputs/first")
    return 0


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
    from vlm_sft.common.console import warn
    from vlm_sft.common.errors import DataError
    from vlm_sft.data.audit import check_images
    from vlm_sft.data.plain_text import reads_like_control

    if max_length is not None and (max_length < 1 or base_model is None):
        raise DataError(
            f"--max_length {max_length} is {'below 1' if base_model else 'without a tokenizer'}",
            "pass --base_model MODEL and a number of tokens",
        )
    samples, unusable = check_images(drawn)
    if base_model is None:
        _warn_of_strips(samples)
        return samples, unusable, reads_like_control, []
    from vlm_sft.data.dataset import usable_samples
    from vlm_sft.data.oversized import LengthRule, fit, lines
    from vlm_sft.model.encoding import encoder_of
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
    from vlm_sft.data.sources.registry import SPLITS, load_split
    from vlm_sft.data.sources.splits import MissingSplitError

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
    from vlm_sft.common.console import warn

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
    from vlm_sft.common.console import warn
    from vlm_sft.data.duplicates import CONTRADICTION, DUPLICATE

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
    from vlm_sft.common.console import warn
    from vlm_sft.data.sample import OUTSIDE

    away = {path for sample in samples for path in sample.metadata.get(OUTSIDE, ())}
    if away:
        what = "images that lie outside of the data's folder, by their path or a link"
        warn(f"{what}: {len(away):,}; the first: {min(away)}")


def _print_counts(report: AuditReport) -> None:
    """Print the counts and the histogram of questions per image as plain columns."""
    from vlm_sft.common.console import say
    from vlm_sft.data.preview import count_rows

    for name, value in count_rows(report):
        say(f"  {bounded(name):<36} {value:>24}")
    most = max(report.questions_per_image.values(), default=1)
    say("  questions per image (k): images")
    for k, images in report.questions_per_image.items():
        say(f"  {k:>6} {images:>9,} {'#' * max(1, round(40 * images / most))}")

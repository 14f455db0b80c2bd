"""What the user asks of one training: the flags of `vlm-sft train` and `vlm-sft plan`, without torch."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlm_sft.common.errors import DataError
from vlm_sft.common.idle import Idle
from vlm_sft.common.options import option, words_of
from vlm_sft.data.engine_options import EngineOptions
from vlm_sft.data.sources.spec import COLUMNS_HELP
from vlm_sft.evaluate.options import AnswerOptions
from vlm_sft.model.families import DEFAULT_BASE
from vlm_sft.recipe.builtin import FILES, RECIPES, locate_recipe

MAX_BAD_STEPS = 3
AUTO = "auto"
CONTINUE, MERGE = "continue", "merge"  # what a second stage does with the adapter of the first


@dataclass(frozen=True, kw_only=True)
class TrainOptions(AnswerOptions):
    """The command line of one training run.

    Attributes:
        output_dir: the run's folder.
        overrides: recipe keys given as flags.
        engine: caches and packing.
    """

    output_dir: Path
    overrides: dict[str, object] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)
    sft_config: Path | None = option(
        None,
        "recipe: a JSON or YAML file such as configs/sft_config_best.json, or one of the package by its name: "
        + ", ".join(RECIPES.values()),
        "FILE",
        parse=Path,
        read=locate_recipe,
    )
    base_model: str = option(
        DEFAULT_BASE,
        "Hub id or folder of the base model, or 'pocket' for the embedded one (default: %(default)s)",
        "MODEL",
    )
    adapter: Path | None = option(
        None,
        "begin with a trained adapter: the folder of a run, of a checkpoint or of an export (its base is taken where "
        "--base_model is not given, and its prompt)",
        "FOLDER",
        parse=Path,
    )
    adapter_mode: str = option(
        CONTINUE,
        "train the weights of --adapter on, or merge them into the base (OUTPUT_DIR/merged_base) and train new ones "
        "(default: %(default)s)",
        choices=(CONTINUE, MERGE),
    )
    dataset: str = option(
        "chartqa,textvqa",
        "NAME[@PATH][:WEIGHT], comma separated: chartqa, textvqa, easy_vqa, demo, demo_charts, demo_text, or a path to "
        "your own data (JSONL, CSV, parquet, WebDataset, save_to_disk, a folder or pattern of them), or hub:ORG/NAME; "
        "chartqa@stream fetches --max_train rows only (default: %(default)s)",
        "SETS",
    )
    columns: str | None = option(None, COLUMNS_HELP, "NAME=COLUMN,…")
    loss_weights: str | None = option(
        None,
        "how much the answers of a set count in the loss, NAME=WEIGHT, comma separated (default: 1 each); a record's "
        "own weight multiplies it",
        "WEIGHTS",
    )
    flash_attn: bool = option(False, "FlashAttention (bfloat16, GPUs from Ampere on)")
    deepspeed: str | None = option(
        None, "zero2, zero3 or a DeepSpeed JSON file (default: zero2 under the deepspeed launcher, else none)", "CONFIG"
    )
    fsdp: bool = option(
        False,
        "divide weights, gradients and optimizer over the ranks by PyTorch's FSDP2, without DeepSpeed: for a model "
        "that does not fit on one device",
    )
    resume: str | None = option(
        None,
        "continue from the newest checkpoint of --output_dir that verifies, or from the folder given; without one, "
        "'auto' starts from the beginning, so it can be part of every launch line",
        "CHECKPOINT",
        bare=AUTO,
    )
    overwrite: bool = option(False, "start over in a folder that holds another run", names=("--overwrite_output_dir",))
    allow_changes: bool = option(
        False,
        "resume although recipe, data, base model or prompt are not those of the checkpoint; the differences are "
        "listed either way",
    )
    on_save_error: str = option(
        "continue",
        "when a checkpoint cannot be written (disk full, read-only, broken): continue and try again at the next one, "
        "or end with an error; earlier checkpoints are not touched (default: %(default)s)",
        choices=("continue", "stop"),
    )
    on_bad_sample: str = option(
        "stop",
        "when an image cannot be read during the training: end with an error that names it, or train another sample of "
        "the same data set and record both in anomalies.jsonl (default: %(default)s)",
        choices=("stop", "replace"),
    )
    max_bad_steps: int = option(
        MAX_BAD_STEPS,
        "end the training after N steps in a row whose loss or gradient is not finite; each one is skipped and its "
        "samples are listed in anomalies.jsonl (default: %(default)s)",
        "N",
    )
    eval_benchmarks: str | None = option(
        None, "benchmarks of the final evaluation, or 'none' (default: those of --dataset)", "SETS"
    )
    max_left_out: float = option(
        0.01, "share of unusable samples that does not stop the run, 0 to 1 (default: %(default)s)", "SHARE"
    )
    eval_samples: int | None = option(
        None,
        "questions a benchmark, drawn with a fixed seed from the validation split, that are answered at each "
        "evaluation (default: 200 where metric_for_best_model or --guard needs them)",
        "N",
    )
    guard: str | None = option(
        None,
        "a checkpoint that loses more points than this against the base cannot be the best, e.g. textvqa:2.0; several "
        "with commas; exit code 3 when none is left",
        "BENCHMARK:POINTS",
    )
    watch: bool = option(
        False, "serve the live page of the run on 127.0.0.1 while it goes on: progress, curves, validation answers"
    )
    verbose: bool = option(
        False, "print everything in the run's log.txt: counts, launch, caches, kernels, the items of the forecast"
    )
    probe: bool = option(False, "run a few passes first, a minute at most, to forecast time and memory from them")
    ignore_forecast: bool = option(
        False, "start although memory or disk surely do not suffice (without it: exit code 4)"
    )
    local_rank: int | None = option(None, argparse.SUPPRESS, names=("--local_rank", "--local-rank"))


IDLE = (
    Idle(("adapter_mode",), lambda o: o.adapter is None, "without --adapter", "add --adapter, or leave it out"),
    Idle(("allow_changes",), lambda o: o.resume is None, "without --resume", "add --resume, or leave it out"),
    Idle(
        ("overwrite_output_dir", "overwrite"),
        lambda o: o.resume is not None,
        "together with --resume, which continues the run",
        "keep one of them",
    ),
)


def flag_text(value: object) -> str:
    """The value of a recipe key as its flag takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def train_words(options: TrainOptions) -> list[str]:
    """The flags of `vlm-sft train` that make these options, its folder aside; base and data are always named."""
    file = options.sft_config
    recipe = Path(RECIPES[file.stem]) if file is not None and file.parent == FILES else file
    always = ["--base_model", options.base_model, "--dataset", options.dataset]
    others = replace(options, sft_config=recipe, base_model=TrainOptions.base_model, dataset=TrainOptions.dataset)
    keys = [word for key, value in options.overrides.items() for word in (f"--{key}", flag_text(value))]
    return [*words_of(others), *always, *words_of(options.engine), *keys]


def launch_line(options: TrainOptions, gpus: int) -> str:
    """The command that starts a training on so many devices of this machine."""
    start = ["vlm-sft", "train"] if gpus == 1 else ["torchrun", f"--nproc_per_node={gpus}", "-m", "vlm_sft", "train"]
    return shlex.join([*start, *train_words(options), "--output_dir", str(options.output_dir)])


def image_size(text: str) -> tuple[int, int]:
    """Read `--image_size`: width and height in pixels.

    Raises:
        DataError: the text is not a size.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise DataError(f"--image_size {text} is not a size", "pass WIDTHxHEIGHT in pixels, e.g. 850x600")
    return int(width), int(height)


def _at_least_one(count: int) -> int:
    return max(1, count)


@dataclass(frozen=True)
class HypotheticalData:
    """A data set that does not exist yet: all images are alike; `image_size` is (width, height) in pixels."""

    questions: int = option(None, "number of training questions", "N")
    images: int | None = option(None, "number of images (default: one per question)", "N")
    image_size: tuple[int, int] = option(
        (850, 600), "of every image in pixels (default: %(default)s)", "WxH", text="850x600", read=image_size
    )
    question_tokens: int = option(30, "(default: %(default)s)", "N", parse=int, read=_at_least_one)
    answer_tokens: int = option(5, "(default: %(default)s)", "N", parse=int, read=_at_least_one)


@dataclass(frozen=True)
class PlanOptions:
    """What `vlm-sft plan` forecasts, and on which devices.

    Attributes:
        train: what would be trained.
        hypothetical: questions in place of those of a data set; None reads the data set.
    """

    train: TrainOptions
    hypothetical: HypotheticalData | None = None
    gpus: int | None = option(None, "number of devices (default: 1)", "N")
    gpu_type: str | None = option(None, "a device of the table, e.g. A100-80GB; a wrong name lists them", "NAME")


PLAN_IDLE = (
    Idle(
        ("images", "image_size", "question_tokens", "answer_tokens"),
        lambda o: o.questions is None,
        "without --questions",
        "add --questions N, or leave it out to read --dataset",
    ),
    Idle(
        (
            *("dataset", "columns", "loss_weights", "eval_benchmarks", "eval_samples", "max_eval", "max_left_out"),
            *("max_new_tokens", "prompt_template", "system"),
        ),
        lambda o: o.questions is not None,
        "with --questions, which stands for data without evaluations",
        "leave it out",
    ),
)


@dataclass(frozen=True)
class CheckRequest:
    """What `vlm-sft data check` looks at.

    Attributes:
        dataset: names and paths, as of `--dataset`.
    """

    dataset: str
    columns: str | None = option(None, COLUMNS_HELP, "NAME=COLUMN,…")
    split: str = option(
        "train", "which split to check (default: %(default)s)", choices=("train", "validation", "test", "all")
    )
    output_dir: Path | None = option(None, "folder to write to (default: outputs/data_check/NAME-SPLIT)", "DIR")
    base_model: str | None = option(
        None,
        "Hub id, folder, or 'pocket': also look for images and texts that this model's processor cannot take",
        "MODEL",
    )
    max_length: int | None = option(
        None,
        "with --base_model: name the samples of more than N tokens (default: what the model's positions reach)",
        "N",
    )
    limit: int | None = option(None, "check a seeded sample of at most N questions", "N")
    max_left_out: float = option(
        0.01, "share of samples that may be unusable, 0 to 1 (default: %(default)s)", "FRACTION"
    )

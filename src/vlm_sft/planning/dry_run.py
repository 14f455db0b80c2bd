"""The forecast of a training that is not started: `vlm-sft plan`.

Nothing is trained and no image is processed. Visual tokens follow from the sizes of the images by the processor's own
arithmetic, text tokens from the real tokenizer; for a Hub model that is not at hand, from the built-in table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common import artifacts
from vlm_sft.common.console import progress, say, warn
from vlm_sft.common.errors import DataError, ModelError, RunError
from vlm_sft.common.record import RunRecord, device_name, resident_bytes
from vlm_sft.data.audit import enforce, histogram, left_out_line
from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.cache.encoded import DataCache, group_key
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import EncodedGroup, Encoder, picture_sizes
from vlm_sft.data.processor import visual_tokens
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.distributed.launch import Launch, quiet_libraries, read_launch, threads_of_a_rank
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast.calibration import Calibration, from_past_runs, history_key, read_past_runs, settled_rates
from vlm_sft.forecast.estimate import Case, Forecast, forecast
from vlm_sft.forecast.hardware import Device, device_named, table_rates
from vlm_sft.forecast.image_tokens import qwen_grid
from vlm_sft.forecast.limits import shortages
from vlm_sft.forecast.shapes import ModelShape, find_published
from vlm_sft.model.caches import Engine
from vlm_sft.model.gpu.flash import SHARED_FLASH, takes_width
from vlm_sft.model.load import Base, choose_attention, default_dtype
from vlm_sft.planning.device_rates import rates_here
from vlm_sft.planning.forecast_inputs import Known, case_of, free_space, history_setting, setting_of, shape_of
from vlm_sft.planning.hypothetical_data import Imagined, known_from_numbers, known_from_table
from vlm_sft.planning.options import Run, TrainOptions
from vlm_sft.planning.pack_choice import decided
from vlm_sft.planning.probe import probe_plan
from vlm_sft.planning.run_forecast import describe, refuse_or_warn
from vlm_sft.planning.run_plan import (
    Plan,
    few_steps,
    final_tasks,
    find_run_base,
    fit_questions,
    limited,
    load_data,
    planner_over,
    tell_notes,
    tell_parts,
    validation_plan,
)
from vlm_sft.planning.validation_plan import ValidationPlan, check_request
from vlm_sft.recipe.load import read_recipe
from vlm_sft.recipe.schema import Recipe
from vlm_sft.recipe.validation import resolve_schedule


@dataclass(frozen=True)
class PlanOptions:
    """The command line of `vlm-sft plan`.

    Attributes:
        train: what would be trained.
        gpus: devices; None for what there is.
        gpu_type: a name of the table of devices; None for what there is.
        imagined: questions that nobody has yet; None for those of the data set.
        counted: images whose tokens were counted already; several plans share it.
    """

    train: TrainOptions
    gpus: int | None = None
    gpu_type: str | None = None
    imagined: Imagined | None = None
    counted: dict[str, EncodedGroup] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Planned:
    """A run that is forecast and not started.

    Attributes:
        case, calibration, found: the forecast and what it follows from.
        known: its questions and images.
        run: the run that it would be.
    """

    case: Case
    calibration: Calibration
    found: Forecast
    known: Known
    run: Run

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.run.recipe


def plan(options: PlanOptions) -> Planned:
    """Forecast a training, tell it, and refuse what surely does not fit.

    Raises:
        ForecastError: memory or disk surely do not suffice.
        VlmSftError: a mistake in recipe, data, model or flags.
    """
    planned = planned_run(options)
    case, found = planned.case, planned.found
    for line in schedule_lines(planned):
        say(line)
    for line in describe(found, case):
        say(line)
    train = options.train
    elsewhere = options.gpu_type is not None
    free = (None, None) if elsewhere else free_space(train.output_dir, cache_root(train))
    refuse_or_warn(shortages(case, found, planned.calibration, *free), train.ignore_forecast)
    return planned


def cache_root(train: TrainOptions) -> Path:
    """The cache folder of a run."""
    return train.engine.cache_dir or default_cache_dir()


def planned_run(options: PlanOptions) -> Planned:
    """Forecast a training without telling it."""
    quiet_libraries()
    train = options.train
    device = device_named(options.gpu_type) if options.gpu_type else None
    recipe = read_recipe(train.sft_config, train.overrides).recipe
    launch = _launch(options, device)
    with tempfile.TemporaryDirectory(prefix="vlm_sft_plan") as folder, threads_of_a_rank(launch):
        aside = replace(train, output_dir=Path(folder))
        specs = parse_datasets(train.dataset)
        run = Run(aside, recipe, specs, launch, RunRecord(Path(folder), {}), None)
        if options.imagined is not None:
            known, shape = known_from_numbers(run, options.imagined)
            return _planned(run, known, None, (), shape, device)
        try:
            # 4-bit weights need a GPU to be loaded, not to be counted.
            base = find_run_base(train, replace(recipe, load_in_4bit=False), specs)
        except ModelError as error:
            try:
                published = find_published(train.base_model)
            except ModelError:
                raise error from None
            say(f"{published.name} is not at hand: sizes from the built-in table ({published.source}), text estimated")
            train_samples, eval_samples, _, tasks, asked = _questions(run, None)
            known = known_from_table(run, published, train_samples, eval_samples)
            return _planned(run, known, asked, tasks, published.shape, device)
        return _from_base(run, base, device, options.counted)


def _launch(options: PlanOptions, device: Device | None) -> Launch:
    """The ranks that the run would have."""
    gpus = 1 if options.gpus is None else options.gpus
    if gpus < 1:
        raise RunError(f"--gpus {gpus} is below 1", "give a number of devices")
    deepspeed = options.train.deepspeed
    here = read_launch(None, None)
    parallel = deepspeed or ("single" if gpus == 1 else "ddp")
    if parallel not in ("single", "ddp", "zero2", "zero3"):
        parallel = "deepspeed"
    return replace(here, world_size=gpus, parallel=parallel, cpu=here.cpu and device is None)


def _value_bytes(recipe: Recipe, device: Device | None) -> int:
    """Bytes of one number of the computation."""
    if device is not None and recipe.bf16 == "auto":
        return 2 if device.bf16 else 4
    if device is not None and recipe.bf16 and not device.bf16:
        warn(f"--bf16 true: {device.name} has no bfloat16 of its own; emulated, it is slower than forecast")
    return torch.finfo(default_dtype(recipe.bf16)).bits // 8


def _calibrated(run: Run, case: Case, shape: ModelShape, device: Device | None) -> tuple[Case, Calibration]:
    """Apply what past runs of this machine say; nothing for a device that is not here."""
    if device is not None:
        return case, Calibration()
    past = read_past_runs(cache_root(run.options))
    key = history_key(device_name(), torch.get_num_threads(), shape.key, history_setting(run.launch, case.setting))
    rates = settled_rates(past, key, case.setting.rates)
    return replace(case, setting=replace(case.setting, rates=rates)), from_past_runs(past, key)


def _planned(
    run: Run,
    known: Known,
    asked: ValidationPlan | None,
    tasks: Sequence[Task],
    shape: ModelShape,
    device: Device | None,
) -> Planned:
    """The forecast of what is known."""
    size = _value_bytes(run.recipe, device)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    rates = table_rates(device) if device else rates_here(shape, dtype)
    width = shape.text.head_dim
    flash = run.options.flash_attn and size == 2 and takes_width(width)
    if device is None:
        flash = choose_attention(run.options.flash_attn, dtype, width)[0] == SHARED_FLASH
    setting = setting_of(run, shape, size, rates, flash)
    run = decided(run, lambda: setting, known.planner, known.visual)
    known = known.packed(run.tokens_per_pack)
    setting = replace(setting, checkpointing=run.checkpointing)
    case = case_of(
        run,
        known,
        asked,
        tasks,
        setting,
        prepared_already=False,
        process_bytes=0.0 if rates.gpu else float(resident_bytes()),
    )
    case, calibration = _calibrated(run, case, shape, device)
    return Planned(case, calibration, forecast(case, calibration), known, run)


class CountingCache(DataCache):
    """Encodes questions without processing their images, wherever their tokens follow from the images' sizes.

    Args:
        encoder: encodes the questions.
        root, name: as of `DataCache`; nothing is written.
        counted: what was encoded already, by `group_key`; what is encoded here is added.
    """

    def __init__(self, encoder: Encoder, root: Path, name: str, counted: dict[str, EncodedGroup]) -> None:
        super().__init__(encoder, root, name, prepared=False)
        self.counted = counted

    def prepare(self, groups: Sequence[Sequence[Sample]], description: str) -> Iterator[EncodedGroup | DataError]:
        """As in `DataCache`; the tensors hold the grids of the images alone."""
        with progress(sum(map(len, groups)), description, "questions") as bar:
            for members in groups:
                key = group_key(members)
                try:
                    if key not in self.counted:
                        tensors = grid_tensors(self.encoder, members[0])
                        self.counted[key] = self.encoder.encode(members, tensors=tensors)
                    yield self.counted[key]
                except DataError as error:
                    yield error
                bar.advance(len(members))


def grid_tensors(encoder: Encoder, sample: Sample) -> dict[str, torch.Tensor]:
    """The grids that the processor would report for a sample's images; {} where it works by sizes.

    Raises:
        SampleError: it refuses one of them.
    """
    images = encoder.processor.image_processor
    size = dict(getattr(images, "size", None) or {})
    if not hasattr(images, "merge_size") or not {"shortest_edge", "longest_edge"} <= set(size):
        return {}
    bounds = (images.patch_size, images.merge_size, size["shortest_edge"], size["longest_edge"])
    grids = []
    for image, (width, height) in zip(sample.images, picture_sizes(sample), strict=True):
        visual_tokens(encoder.processor, width, height, f"{image.source} ({width} x {height} pixels)")
        grids.append([1, *qwen_grid(height, width, *bounds)])
    return {"image_grid_thw": torch.tensor(grids)}


def _questions(
    run: Run, encoder: Encoder | None
) -> tuple[list[Sample], list[Sample], list[LeftOut], list[Task], ValidationPlan | None]:
    """The questions of training, evaluation loss, final evaluation and evaluations during training.

    Args:
        run: the run.
        encoder: counts the tokens of answers; None estimates.
    """
    guards = check_request(run.recipe, run.specs, run.options.guard, run.options.eval_samples)
    train_samples, eval_samples, left_out = load_data(run.specs, run.recipe)
    tasks, asked = final_tasks(run), validation_plan(run, guards)
    tell_parts(run, train_samples, eval_samples, asked, tasks)
    prompt, plain = (encoder.prompt, encoder.chat.plain) if encoder else (PromptSettings(), None)
    tasks, asked = limited(run, tasks, asked, prompt, plain)
    return train_samples, eval_samples, left_out, tasks, asked


def _from_base(run: Run, base: Base, device: Device | None, counted: dict[str, EncodedGroup]) -> Planned:
    """Plan with a base whose processor is at hand."""
    options, recipe = run.options, run.recipe
    encoder = Encoder(base.processor, base.prompt, base.stop_ids)
    train_samples, eval_samples, left_out, tasks, asked = _questions(run, encoder)
    engine = Engine(options.engine, run.launch, base.name, base.path)
    cache = CountingCache(encoder, engine.root, base.name, counted)
    data = PreparedData(train_samples, encoder, "counting tokens", cache)
    evaluation = PreparedData(eval_samples, encoder, "counting tokens (evaluation)", cache) if eval_samples else None
    total = len(train_samples) + len(eval_samples) + len(left_out)
    left_out = left_out + data.left_out + (evaluation.left_out if evaluation else [])
    enforce(left_out, total, options.max_left_out)
    if left_out:
        warn(left_out_line(left_out))
    tell_notes(run, train_samples + eval_samples, encoder)
    tasks, asked = fit_questions(run, tasks, asked, encoder)
    planner = planner_over(run, data.lengths)
    eval_planner = replace(planner, lengths=evaluation.lengths) if evaluation and len(evaluation) else None
    schedule = resolve_schedule(recipe, planner.steps_per_epoch)
    drawn = Plan(base, schedule, data, evaluation, planner, eval_planner, engine, cache, {})
    planned = _planned(run, Known.of_plan(drawn, tasks), asked, tasks, shape_of(base), device)
    if not options.probe:
        return planned
    if device is not None:
        raise RunError("--probe measures this machine, and --gpu_type names another one", "leave one of them out")
    drawn = replace(drawn, planner=planned.known.planner, eval_planner=planned.known.eval_planner)
    calibration = probe_plan(planned.run, drawn, planned.case, tasks)
    return replace(planned, calibration=calibration, found=forecast(planned.case, calibration))


def schedule_lines(planned: Planned) -> list[str]:
    """Schedule, questions, images and tokens of a plan."""
    known, schedule = planned.known, planned.known.schedule
    questions = known.planner.questions_per_epoch
    evaluations, saves = schedule.evaluation_steps(), schedule.save_steps_list()
    visual = sorted(known.visual)
    tokens = sorted(size for group in known.planner.lengths for size in group.questions)
    lines = [
        f"schedule: {schedule.total_steps:,} steps of {known.planner.global_batch_size} questions "
        f"({schedule.steps_per_epoch:,} an epoch), warmup {schedule.warmup_steps}, {len(evaluations):,} evaluations, "
        f"{len(saves):,} checkpoints of which {planned.case.saving.kept:,} are kept",
        f"data: {questions:,} questions on {known.images:,} images ({questions / known.images:.2f} each)",
        "tokens of an image: " + _spread(visual) + "; of a question with its answer: " + _spread(tokens),
        f"epoch: {planned.case.epoch.total.packs:,.0f} packs, {planned.case.epoch.total.tokens:,.0f} tokens, the "
        f"largest {planned.case.epoch.largest.tokens:,.0f}",
    ]
    few = few_steps(planned.recipe, schedule, known.planner)
    return [*lines, *(f"note: {note}" for note in (*schedule.notes, *([few] if few else [])))]


def _spread(values: Sequence[int]) -> str:
    """Smallest, quartiles and largest."""
    marks = [values[min(len(values) - 1, round(share * (len(values) - 1)))] for share in (0, 0.25, 0.5, 0.75, 1)]
    return " / ".join(f"{value:,}" for value in marks)


def plan_facts(planned: Planned) -> dict[str, Any]:
    """What `--output` writes."""
    schedule, known = planned.known.schedule, planned.known
    return {
        "schema": 1,
        "recipe": planned.recipe.to_dict(),
        "schedule": {
            "steps": schedule.total_steps,
            "steps_per_epoch": schedule.steps_per_epoch,
            "warmup_steps": schedule.warmup_steps,
            "evaluations": len(schedule.evaluation_steps()),
            "checkpoints": len(schedule.save_steps_list()),
        },
        "questions": known.planner.questions_per_epoch,
        "images": known.images,
        "histograms": {
            "image_tokens": histogram(known.visual),
            "question_tokens": histogram([size for group in known.planner.lengths for size in group.questions]),
        },
        "passes": planned.run.passes.to_dict() if planned.run.passes else None,
        "flops": planned.case.flops,
        "forecast": planned.found.to_dict(),
    }


def write_plan(planned: Planned, path: Path) -> Path:
    """Write a plan as JSON."""
    return artifacts.write_json(path, plan_facts(planned))

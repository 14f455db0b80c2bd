"""The forecast of a training that is not started: `vlm-sft plan`.

Nothing is trained and no image is processed. Visual tokens follow from the sizes of the images by the processor's own
arithmetic, text tokens from the real tokenizer; for a Hub model that is not at hand, from the built-in table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlm_sft.common.console import say, warn
from vlm_sft.common.errors import ModelError, RunError
from vlm_sft.common.record import RunRecord, resident_bytes
from vlm_sft.data.audit import enforce, left_out_line
from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.distributed.launch import Launch, quiet_libraries, read_launch, require_fsdp_alone, threads_of_a_rank
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast.calibration import Calibration, from_past_runs, read_past_runs, settled_rates
from vlm_sft.forecast.estimate import forecast_run
from vlm_sft.forecast.hardware import Device, device_named, table_rates
from vlm_sft.forecast.inputs import ForecastInputs
from vlm_sft.forecast.limits import shortages
from vlm_sft.forecast.shapes import ModelShape, find_published
from vlm_sft.model.caches import Engine
from vlm_sft.model.cpu.matmul import narrows
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.gpu.flash import SHARED_FLASH, takes_width
from vlm_sft.model.load import Base, choose_attention, default_dtype
from vlm_sft.planning.answer_limits import with_token_limits
from vlm_sft.planning.device_rates import rates_here
from vlm_sft.planning.forecast_inputs import RunData, forecast_inputs, free_space
from vlm_sft.planning.hypothetical_data import facts_from_numbers, facts_from_table
from vlm_sft.planning.number_format import FormatRates, decide_format
from vlm_sft.planning.options import PlanOptions, TrainOptions
from vlm_sft.planning.pack_choice import decide_passes
from vlm_sft.planning.plan_report import PlannedRun, schedule_lines
from vlm_sft.planning.probe import probe_plan
from vlm_sft.planning.run_forecast import describe, refuse_or_warn
from vlm_sft.planning.run_plan import (
    Plan,
    final_tasks,
    find_run_base,
    fit_questions,
    load_data,
    plan_epochs,
    tell_notes,
    tell_parts,
    validation_plan,
)
from vlm_sft.planning.run_recipe import read_run_recipe
from vlm_sft.planning.run_setting import past_runs_key, setting_of, shape_of
from vlm_sft.planning.sample_lengths import length_rule, prepared
from vlm_sft.planning.token_counting import CountingCache
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan, check_request


def plan(options: PlanOptions) -> PlannedRun:
    """Forecast a training, print the forecast, and refuse what surely does not fit.

    Raises:
        ForecastError: memory or disk surely do not suffice.
        VlmSftError: a mistake in recipe, data, model or flags.
    """
    planned = plan_run(options)
    for line in (*schedule_lines(planned), *describe(planned.forecast, planned.inputs)):
        say(line)
    train = options.train
    elsewhere = options.gpu_type is not None
    free = (None, None) if elsewhere else free_space(train.output_dir, cache_root(train))
    refuse_or_warn(shortages(planned.inputs, planned.forecast, planned.calibration, *free), train.ignore_forecast)
    return planned


def cache_root(train: TrainOptions) -> Path:
    """The cache folder of a run."""
    return train.engine.cache_dir or default_cache_dir()


def plan_run(options: PlanOptions, counted: dict[str, EncodedGroup] | None = None) -> PlannedRun:
    """Forecast a training without printing the forecast.

    Args:
        options: the training and its devices.
        counted: images whose tokens were counted already; several plans share it.
    """
    quiet_libraries()
    train = options.train
    device = device_named(options.gpu_type) if options.gpu_type else None
    loaded = read_run_recipe(train)
    recipe, launch = loaded.recipe, _launch(options, device)
    for note in loaded.notes:
        say(note)
    with tempfile.TemporaryDirectory(prefix="vlm_sft_plan") as folder, threads_of_a_rank(launch):
        aside = replace(train, output_dir=Path(folder))
        specs = parse_datasets(train.dataset, train.columns)
        run = TrainingRun(aside, recipe, specs, launch, RunRecord(Path(folder), {}), None)
        if options.hypothetical is not None:
            data, shape = facts_from_numbers(run, options.hypothetical)
            return _forecast(run, data, None, (), shape, device)
        try:
            # 4-bit weights need a GPU to be loaded, not to be counted.
            base = find_run_base(train, replace(recipe, load_in_4bit=False), specs)
        except ModelError as error:
            try:
                published = find_published(train.base_model)
            except ModelError:
                raise error from None
            say(
                f"{published.name} is not available: sizes from the built-in table ({published.source}), text estimated"
            )
            questions = _questions(run, None)
            data = facts_from_table(run, published, questions.train, questions.evaluation)
            return _forecast(run, data, questions.validation, questions.tasks, published.shape, device)
        return _from_base(run, base, device, {} if counted is None else counted)


def _launch(options: PlanOptions, device: Device | None) -> Launch:
    """The ranks that the run would have."""
    gpus = 1 if options.gpus is None else options.gpus
    if gpus < 1:
        raise RunError(f"--gpus {gpus} is below 1", "give a number of devices")
    deepspeed = options.train.deepspeed
    if options.train.fsdp:
        require_fsdp_alone(deepspeed, gpus)
    here = read_launch(None, None)
    parallel = "fsdp" if options.train.fsdp else deepspeed or ("single" if gpus == 1 else "ddp")
    if parallel not in ("single", "ddp", "fsdp", "zero2", "zero3"):
        parallel = "deepspeed"
    return replace(here, world_size=gpus, parallel=parallel, cpu=here.cpu and device is None)


def _value_bytes(run: TrainingRun, shape: ModelShape, device: Device | None) -> int:
    """Bytes of one number of the computation."""
    recipe = run.recipe
    if device is not None and recipe.bf16 == "auto":
        return 2 if device.bf16 else 4
    if device is not None and recipe.bf16 and not device.bf16:
        warn(f"--bf16 true: {device.name} does not support bfloat16; emulated, it is slower than forecast")
    if recipe.bf16 == "auto" and narrows("cpu"):
        found = decide_format(shape, recipe, run.launch.deepspeed is not None or run.launch.fsdp)
        if isinstance(found, FormatRates) and found.pays:
            return 2
    return default_dtype(recipe.bf16).itemsize


def _calibrated(
    run: TrainingRun, inputs: ForecastInputs, shape: ModelShape, device: Device | None
) -> tuple[ForecastInputs, Calibration]:
    """Apply what past runs of this machine say; nothing for a device that is not here."""
    if device is not None:
        return inputs, Calibration()
    past, key = read_past_runs(cache_root(run.options)), past_runs_key(shape, inputs.setting)
    return inputs.with_setting(rates=settled_rates(past, key, inputs.setting.rates)), from_past_runs(past, key)


def _forecast(
    run: TrainingRun,
    data: RunData,
    validation: ValidationPlan | None,
    tasks: Sequence[Task],
    shape: ModelShape,
    device: Device | None,
) -> PlannedRun:
    """Decide the passes of a run, and forecast it."""
    size = _value_bytes(run, shape, device)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    rates = table_rates(device) if device else rates_here(shape, dtype)
    width = shape.text.head_dim
    flash = run.options.flash_attn and size == 2 and takes_width(width)
    if device is None:
        flash = choose_attention(run.options.flash_attn, dtype, width)[0] == SHARED_FLASH
    setting = setting_of(run, shape, size, rates, flash)
    run = decide_passes(run, lambda: setting, data.planner, data.visual)
    data = data.packed(run.tokens_per_pack)
    setting = replace(setting, checkpointing=run.checkpointing)
    process = 0.0 if rates.gpu else float(resident_bytes())
    inputs = forecast_inputs(run, data, validation, tasks, setting, prepared_already=False, process_bytes=process)
    inputs, calibration = _calibrated(run, inputs, shape, device)
    return PlannedRun(run, data, inputs, calibration, forecast_run(inputs, calibration))


@dataclass(frozen=True)
class _Questions:
    """The questions of a run: of training, evaluation loss, final evaluation and validation; what was left out."""

    train: list[Sample]
    evaluation: list[Sample]
    left_out: list[LeftOut]
    tasks: list[Task]
    validation: ValidationPlan | None


def _questions(run: TrainingRun, encoder: Encoder | None) -> _Questions:
    """Load the questions of a run; `encoder` counts the tokens of answers, None estimates them."""
    guards = check_request(run.recipe, run.specs, run.options)
    train, evaluation, left_out = load_data(run.specs, run.recipe, run.options.loss_weights)
    tasks, validation = final_tasks(run), validation_plan(run, guards)
    tell_parts(run, train, evaluation, validation, tasks)
    prompt, plain = (encoder.prompt, encoder.chat.plain) if encoder else (PromptSettings(), None)
    tasks, validation = with_token_limits(run, tasks, validation, prompt, plain)
    return _Questions(train, evaluation, left_out, tasks, validation)


def _from_base(run: TrainingRun, base: Base, device: Device | None, counted: dict[str, EncodedGroup]) -> PlannedRun:
    """Plan with a base whose processor is at hand."""
    options = run.options
    encoder = encoder_of(base)
    questions = _questions(run, encoder)
    engine = Engine(options.engine, run.launch, base.name, base.path)
    cache = CountingCache(encoder, engine.root, base.name, counted)
    rule = length_rule(run.recipe, base)
    data = prepared(run, questions.train, encoder, rule, "training", cache)
    part = "evaluation loss"
    evaluation = prepared(run, questions.evaluation, encoder, rule, part, cache) if questions.evaluation else None
    total = len(questions.train) + len(questions.evaluation) + len(questions.left_out)
    left_out = questions.left_out + data.left_out + (evaluation.left_out if evaluation else [])
    enforce(left_out, total, options.max_left_out)
    if left_out:
        warn(left_out_line(left_out))
    tell_notes(run, questions.train + questions.evaluation, encoder)
    tasks, validation = fit_questions(run, questions.tasks, questions.validation, encoder, rule)
    planner, eval_planner, schedule = plan_epochs(run, base, data, evaluation)
    drawn = Plan(base, schedule, data, evaluation, planner, eval_planner, engine, cache, {})
    planned = _forecast(run, RunData.of_plan(drawn, tasks), validation, tasks, shape_of(base), device)
    if not options.probe:
        return planned
    if device is not None:
        raise RunError("--probe measures this machine, and --gpu_type names another one", "leave one of them out")
    drawn = replace(drawn, planner=planned.data.planner, eval_planner=planned.data.eval_planner)
    calibration = probe_plan(planned.run, drawn, planned.inputs, tasks)
    return replace(planned, calibration=calibration, forecast=forecast_run(planned.inputs, calibration))

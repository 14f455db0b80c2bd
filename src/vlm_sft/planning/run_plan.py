"""From data sets to a plan: load, mix, encode, pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import detail, is_main_process, say, warn
from vlm_sft.common.errors import DataError
from vlm_sft.common.formats import plural
from vlm_sft.data.audit import enforce, left_out_line, note_lines, notes_of
from vlm_sft.data.cache.directory import cache_bytes
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.mixture import mix, stratified_limit, weighted
from vlm_sft.data.oversized import LengthRule
from vlm_sft.data.packing import EpochPlanner, GroupLengths
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import LeftOut, Sample, counted
from vlm_sft.data.sources.registry import is_synthetic, load_split
from vlm_sft.data.sources.spec import DatasetSpec, parse_beside, parse_loss_weights, refuse_weights
from vlm_sft.evaluate.guard import Guard
from vlm_sft.evaluate.overlap import cautions, overlaps
from vlm_sft.evaluate.own_metrics import recorded_sources
from vlm_sft.evaluate.tasks import SAMPLE_SEED, Task, fit_prompt, load_tasks, require_same_data, usable_tasks
from vlm_sft.model.caches import Engine, one_an_image
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.load import Base, find_base
from vlm_sft.planning.answer_limits import token_limits
from vlm_sft.planning.fingerprint import METRICS, refuse_changes, run_identity
from vlm_sft.planning.number_format import settle_format
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.sample_lengths import length_rule, prepared, tell
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import NO_BENCHMARKS, ValidationPlan, of_metric, own_rules, plan_validation
from vlm_sft.recipe.metric_names import is_loss
from vlm_sft.recipe.schedule import Schedule, effective_global_batch_size, few_steps_advice, resolve_schedule
from vlm_sft.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """What a run will do, once recipe, data and base are known.

    Attributes:
        base: the base model, without its weights.
        schedule: steps of training, evaluation and checkpoints.
        data, evaluation: encoded questions; `evaluation` is None when there is no evaluation loss.
        planner, eval_planner: how they are packed.
        engine, cache: where prepared data comes from.
        identity: what its checkpoints belong to.
        cache_before: bytes of the cache before the run wrote to it.
    """

    base: Base
    schedule: Schedule
    data: PreparedData
    evaluation: PreparedData | None
    planner: EpochPlanner
    eval_planner: EpochPlanner | None
    engine: Engine
    cache: DataCache
    identity: dict[str, Any]
    cache_before: int = 0


def load_data(
    specs: list[DatasetSpec], recipe: Recipe, loss_weights: str | None = None
) -> tuple[list[Sample], list[Sample], list[LeftOut]]:
    """Load, mix and limit the training questions, and the questions of the evaluation loss.

    Args:
        specs: the data sets.
        recipe: limits and seed.
        loss_weights: as of `--loss_weights`.

    Returns:
        Training samples, evaluation samples, what was left out of either.

    Raises:
        DataError: a data set cannot be loaded, or is not the same on all ranks.
    """
    parts, evaluation, left_out = [], [], []
    weights = parse_loss_weights(loss_weights, specs)
    for spec in specs:
        loaded = load_split(spec, "train", recipe.max_train)
        parts.append((spec, loaded.samples))
        left_out += loaded.left_out
        if recipe.eval_strategy != "no":
            held_out = load_split(spec, "validation", recipe.max_eval)
            evaluation += held_out.samples
            left_out += held_out.left_out
        label = " (synthetic)" if loaded.synthetic else ""
        detail(f"{spec.name}{label}: {loaded.description}")
    mixed = weighted(mix(parts, recipe.max_train, recipe.seed), weights)
    evaluation = stratified_limit(evaluation, recipe.max_eval, SAMPLE_SEED)
    require_same_data([*mixed, *evaluation], left_out)
    return mixed, evaluation, left_out


def final_tasks(run: TrainingRun) -> list[Task]:
    """Load the benchmarks of the final evaluation before the training, so that a mistake shows early."""
    options = run.options
    if options.eval_benchmarks == NO_BENCHMARKS:
        return []
    asked = parse_beside(options.eval_benchmarks, run.specs) if options.eval_benchmarks else run.specs
    if options.eval_benchmarks:
        refuse_weights(asked, "every benchmark is scored for itself")
    tasks, left_out = load_tasks(asked, run.recipe.max_eval, own_rules=own_rules(options, run.specs))
    _enforce_tasks(run, tasks, left_out)
    return tasks


def _enforce_tasks(run: TrainingRun, tasks: list[Task], left_out: list[LeftOut]) -> None:
    """Warn of benchmark questions that cannot be asked, and stop where there are too many."""
    enforce(left_out, sum(len(task.samples) for task in tasks) + len(left_out), run.options.max_left_out)
    if left_out:
        line = f"benchmarks: {left_out_line(left_out)}"
        warn(line)
        run.record.note(line)


def fit_questions(
    run: TrainingRun, tasks: list[Task], validation: ValidationPlan | None, encoder: Encoder, rule: LengthRule
) -> tuple[list[Task], ValidationPlan | None]:
    """Leave out benchmark questions that the base's processor refuses, and treat those that are too long.

    Raises:
        DataError: they are too many.
        ModelError: the processor fails on every image.
    """

    def usable(asked: list[Task], part: str) -> list[Task]:
        fitting, left_out, found = usable_tasks(asked, encoder, rule)
        tell(run, found, rule, sum(len(task.samples) for task in asked), part)
        _enforce_tasks(run, fitting, left_out)
        return fitting

    checked = replace(validation, tasks=usable(validation.tasks, "validation")) if validation else None
    return usable(tasks, "benchmarks"), checked


def tell_notes(run: TrainingRun, samples: list[Sample], encoder: Encoder) -> dict[str, int]:
    """Print and record which samples are not used as they stand; returns as `notes_of` does."""
    notes = notes_of(samples, encoder.holds_control)
    for line in note_lines(notes):
        say(line)
        run.record.note(line)
    return notes


def validation_plan(run: TrainingRun, guards: list[Guard]) -> ValidationPlan | None:
    """Load the questions that are answered at each evaluation, before the training too."""
    validation, left_out = plan_validation(run.recipe, run.specs, guards, run.options)
    if validation is None:
        return None
    _enforce_tasks(run, validation.tasks, left_out)
    counts = ", ".join(f"{task.name} ({len(task.samples):,})" for task in validation.tasks)
    detail(f"answered at each evaluation: {counts}; the best checkpoint is chosen by {validation.metric}")
    for guard in guards:
        detail(f"guard: a checkpoint that loses over {100 * guard.allowed:g} points on {guard.name} cannot be the best")
    return validation


def tell_parts(
    run: TrainingRun,
    train: list[Sample],
    evaluation: list[Sample],
    validation: ValidationPlan | None,
    tasks: list[Task],
) -> None:
    """Print how many questions and images each part of the data has; print and record which of them overlap."""
    validated = evaluation + (validation.samples if validation else [])
    parts = {"training": train, "validation": validated} | {f"test ({task.name})": task.samples for task in tasks}
    sets = ", ".join(spec.name + (" (synthetic)" if is_synthetic(spec.name) else "") for spec in run.specs)
    say(
        f"data: {sets}: "
        + "; ".join(
            f"{name} {counted(list({sample.id: sample for sample in samples}.values()))}"
            for name, samples in parts.items()
            if samples
        )
    )
    found = overlaps({task.name: task.samples for task in tasks}, _choosing(run.recipe, evaluation, validation), train)
    run.record.update(overlap=found)
    lines = [line for task in tasks for line in cautions(task.name, len(task.samples), **found[task.name])]
    seen = overlaps({"": validated}, [], train)[""]["also_trained"]
    if seen:
        lines.append(
            f"{seen:,} of {len(validated):,} validation questions are about images that are trained on: they do not "
            "show when the training should end"
        )
    for line in lines:
        warn(line)
        run.record.note(line)


def _choosing(recipe: Recipe, evaluation: list[Sample], validation: ValidationPlan | None) -> list[Sample]:
    """The questions whose loss or answers decide which checkpoint is kept."""
    if not recipe.load_best_model_at_end or recipe.eval_strategy == "no":
        return []
    answered = validation is not None and (not is_loss(validation.metric) or bool(validation.guards))
    by_answers = validation.samples if validation and answered else []
    return by_answers + of_metric(recipe.metric_for_best_model, evaluation)


def prepare(run: TrainingRun, train_samples: list[Sample], eval_samples: list[Sample], left_out: list[LeftOut]) -> Plan:
    """Check and encode the data, and plan the run.

    Raises:
        VlmSftError: the base cannot be found, or too many samples cannot be used.
    """
    options, recipe, launch = run.options, run.recipe, run.launch
    found = find_run_base(options, recipe, run.specs)
    base, formats = settle_format(found, recipe, launch.deepspeed is not None or launch.fsdp, run.checkpoint)
    run.record.update(number_format=formats)
    total = len(train_samples) + len(eval_samples) + len(left_out)
    encoder = encoder_of(base)
    engine = Engine(options.engine, launch, base.name, base.path)
    cache_before = cache_bytes(engine.root)
    cache = engine.cache(encoder)
    rule = length_rule(recipe, base)
    if is_main_process():
        (options.output_dir / artifacts.OVERSIZED).unlink(missing_ok=True)  # of this run before a resume
    data = prepared(run, train_samples, encoder, rule, "training", cache)
    evaluation = prepared(run, eval_samples, encoder, rule, "evaluation loss", cache) if eval_samples else None
    identity = run_identity(recipe, launch, base, data, evaluation, run.options.adapter)
    identity[METRICS] = recorded_sources(own_rules(options, run.specs).values())
    for line in refuse_changes(run.checkpoint, identity, options.allow_changes):
        warn(f"changed since the checkpoint: {line}")
        run.record.note(f"changed since the checkpoint: {line}")
    left_out = left_out + data.left_out + (evaluation.left_out if evaluation else [])
    notes = tell_notes(run, train_samples + eval_samples, encoder)
    _write_data_facts(options.output_dir, options.dataset, data, evaluation, left_out, notes)
    enforce(left_out, total, options.max_left_out, options.output_dir / artifacts.LEFT_OUT)
    planner, eval_planner, schedule = plan_epochs(run, base, data, evaluation)
    if eval_planner is None and recipe.eval_strategy != "no":
        raise DataError("there are no questions for the evaluation loss", "pass --eval_strategy no")
    _tell_plan(run, schedule, data, planner)
    if is_main_process():
        artifacts.write_json(options.output_dir / artifacts.RECIPE, recipe.to_dict())
    return Plan(base, schedule, data, evaluation, planner, eval_planner, engine, cache, identity, cache_before)


def plan_epochs(
    run: TrainingRun, base: Base, data: PreparedData, evaluation: PreparedData | None
) -> tuple[EpochPlanner, EpochPlanner | None, Schedule]:
    """How the questions of training and evaluation loss are packed, and the steps that follow from it."""
    planner = planner_over(run, data.lengths).computed_as(base.rows)
    eval_planner = replace(planner, lengths=evaluation.lengths) if evaluation and len(evaluation) else None
    if run.recipe.eval_strategy != "no":
        of_metric(
            run.recipe.metric_for_best_model, [sample for sample, _, _ in evaluation.samples()] if evaluation else []
        )
    return planner, eval_planner, resolve_schedule(run.recipe, planner.steps_per_epoch)


def image_uses(
    schedule: Schedule, training: Sequence[Sample], evaluation: Sequence[Sample], validation: ValidationPlan | None
) -> list[tuple[list[Sample], float]]:
    """How often the images of a training are looked at.

    Args:
        schedule: steps of the training.
        training, evaluation: one sample per image of the training and of the evaluation loss.
        validation: what is answered at each evaluation.

    Returns:
        Samples, one per image, each list with the number of times that the tower sees each of its images.
    """
    evaluations = schedule.total_steps / schedule.eval_steps if schedule.eval_steps else 0.0
    answered = one_an_image(validation.samples if validation else [])
    return [(list(training), schedule.epochs), (list(evaluation), evaluations), (answered, evaluations)]


def planner_over(run: TrainingRun, lengths: tuple[GroupLengths, ...]) -> EpochPlanner:
    """How a run packs some questions."""
    recipe, launch, engine = run.recipe, run.launch, run.options.engine
    return EpochPlanner(
        lengths,
        effective_global_batch_size(recipe, launch.world_size),
        run.tokens_per_pack,
        launch.world_size,
        recipe.seed,
        max_questions_per_image=recipe.max_questions_per_image,
        max_questions_per_pack=recipe.per_device_train_batch_size,
        share_images=engine.share_images,
        packing=engine.packing,
    )


def find_run_base(options: TrainOptions, recipe: Recipe, specs: list[DatasetSpec]) -> Base:
    """Find the base model, fit its prompt to the answers of the user's data, and print its notes."""
    base = find_base(
        options.base_model,
        flash_attn=options.flash_attn,
        bf16=recipe.bf16,
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
        prompt=PromptSettings.find(options.adapter) if options.adapter else None,
        template=options.prompt_template,
        system=options.system,
        load_in_4bit=recipe.load_in_4bit,
    )
    base = fit_prompt(base, specs, options.prompt_template is not None, token_limits(options, specs))
    for note in base.notes:
        say(note)
    return replace(base, prompt=replace(base.prompt, max_length=recipe.max_length, oversized=recipe.oversized))


def _write_data_facts(
    folder: Path,
    dataset: str,
    data: PreparedData,
    evaluation: PreparedData | None,
    left_out: list[LeftOut],
    notes: dict[str, int],
) -> None:
    """Write data.json and left_out.jsonl."""
    if not is_main_process():
        return
    reasons: dict[str, int] = {}
    for item in left_out:
        reasons[item.reason] = reasons.get(item.reason, 0) + 1
    facts = {"schema": 1, "dataset": dataset, "left_out": reasons, "notes": notes}
    for name, part in (("train", data), ("eval", evaluation)):
        if part is not None:
            summary = part.summary()
            facts[name] = summary | {"synthetic": [key for key in summary["by_dataset"] if is_synthetic(key)]}
    artifacts.write_json(folder / artifacts.DATA, facts)
    artifacts.write_jsonl(folder / artifacts.LEFT_OUT, map(asdict, left_out))
    if left_out:
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        warn(f"{plural(len(left_out), 'sample')} left out ({counts}); see {folder / artifacts.LEFT_OUT}")


def _tell_plan(run: TrainingRun, schedule: Schedule, data: PreparedData, planner: EpochPlanner) -> None:
    """Print one supervised sample, the counts, and the schedule."""
    facts = data.summary()
    detail("one sample as the model sees it; only the part in ⟦ ⟧ is supervised:")
    detail("  " + data.marked_example().replace("\n", "\n  "))
    detail(
        f"training set: {counted([sample for sample, _, _ in data.samples()])}; {facts['supervised_tokens']:,} "
        f"supervised tokens, {facts['image_tokens']:,} image tokens"
    )
    detail(
        f"schedule: {plural(schedule.total_steps, 'step')} of {planner.global_batch_size} questions "
        f"({schedule.steps_per_epoch:,} per epoch), warmup {schedule.warmup_steps}, evaluation every "
        f"{schedule.eval_steps or '-'}, checkpoint every {schedule.save_steps or '-'} steps"
    )
    for note in schedule.notes:
        say(f"note: {note}")
    if few := few_steps(run.recipe, schedule, planner):
        warn(few)
        run.record.note(few)


def few_steps(recipe: Recipe, schedule: Schedule, planner: EpochPlanner) -> str:
    """Advice for a run with too few optimizer steps to learn from; "" for any other."""
    questions, batch = planner.questions_per_epoch, planner.global_batch_size
    return few_steps_advice(recipe, schedule, questions, batch, planner.world_size)

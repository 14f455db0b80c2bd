"""From data sets to a plan: load, mix, encode, pack. Imports recipe, data, model and evaluate's tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlm_sft import artifacts
from vlm_sft.console import is_main_process, say, warn
from vlm_sft.data.answers import fitted
from vlm_sft.data.audit import enforce
from vlm_sft.data.cache import DataCache
from vlm_sft.data.encode import Encoder
from vlm_sft.data.mixture import mix, stratified_limit
from vlm_sft.data.packing import EpochPlanner, GroupLengths
from vlm_sft.data.prepared import PreparedData
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.registry import is_synthetic, load_split
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.errors import DataError
from vlm_sft.evaluate.guard import Guard, parse_guards
from vlm_sft.evaluate.tasks import (
    SAMPLE_SEED,
    Task,
    benchmark_names,
    dataset_text,
    load_tasks,
    parse_token_limits,
    too_short,
    with_limits,
)
from vlm_sft.model.load import Base, find_base
from vlm_sft.recipe.rules import Schedule, effective_global_batch_size, few_steps_advice, resolve_schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.engine import Engine
from vlm_sft.train.identity import refuse_changes, run_identity
from vlm_sft.train.options import Run, TrainOptions
from vlm_sft.train.validation import ValidationPlan, plan_validation

NO_BENCHMARKS = "none"


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


def load_data(specs: list[DatasetSpec], recipe: Recipe) -> tuple[list[Sample], list[Sample], list[LeftOut]]:
    """Load, mix and limit the training questions, and the questions of the evaluation loss.

    Returns:
        Training samples, evaluation samples, what was left out of either.
    """
    parts, evaluation, left_out = [], [], []
    for spec in specs:
        loaded = load_split(spec, "train", recipe.max_train)
        parts.append((spec, loaded.samples))
        left_out += loaded.left_out
        if recipe.eval_strategy != "no":
            held_out = load_split(spec, "validation", recipe.max_eval)
            evaluation += held_out.samples
            left_out += held_out.left_out
        label = " (synthetic)" if loaded.synthetic else ""
        say(f"data: {spec.name}{label}: {loaded.description}")
    mixed = mix(parts, recipe.max_train, recipe.seed)
    evaluation = stratified_limit(evaluation, recipe.max_eval, SAMPLE_SEED)
    return mixed, evaluation, left_out


def final_tasks(run: Run) -> list[Task]:
    """The benchmarks of the final evaluation, loaded before the training so that a mistake shows early."""
    options = run.options
    if options.eval_benchmarks == NO_BENCHMARKS:
        return []
    text = options.eval_benchmarks or dataset_text(run.specs)
    tasks, left_out = load_tasks(text, run.recipe.max_eval)
    enforce(left_out, sum(len(task.samples) for task in tasks) + len(left_out), options.max_left_out)
    return tasks


def validation_plan(run: Run, guards: list[Guard]) -> ValidationPlan | None:
    """The questions that are answered at each evaluation, loaded before the training too."""
    asked, left_out = plan_validation(run.recipe, run.specs, guards, run.options.eval_samples)
    if asked is None:
        return None
    questions = sum(len(task.samples) for task in asked.tasks)
    enforce(left_out, questions + len(left_out), run.options.max_left_out)
    counts = ", ".join(f"{task.name} ({len(task.samples):,})" for task in asked.tasks)
    say(f"answered at each evaluation: {counts}; the best checkpoint is chosen by {asked.metric}")
    for guard in guards:
        say(f"guard: a checkpoint that loses more than {100 * guard.allowed:g} points on {guard.name} is not kept")
    return asked


def prepare(run: Run, train_samples: list[Sample], eval_samples: list[Sample], left_out: list[LeftOut]) -> Plan:
    """Check and encode the data, and plan the run.

    Raises:
        VlmSftError: the base cannot be found, or too many samples cannot be used.
    """
    options, recipe, launch = run.options, run.recipe, run.launch
    base = find_run_base(options, recipe, run.specs)
    total = len(train_samples) + len(eval_samples) + len(left_out)
    encoder = Encoder(base.processor, base.prompt, base.stop_ids)
    engine = Engine(options.engine, launch, base.name, base.path)
    with engine.node_in_turn():
        cache = engine.cache(encoder)
        data = PreparedData(train_samples, encoder, "preparing", cache)
        evaluation = PreparedData(eval_samples, encoder, "preparing (evaluation)", cache) if eval_samples else None
    identity = run_identity(recipe, launch, base, data, evaluation)
    for line in refuse_changes(run.checkpoint, identity, options.allow_changes):
        warn(f"changed since the checkpoint: {line}")
        run.record.note(f"changed since the checkpoint: {line}")
    left_out = left_out + data.left_out + (evaluation.left_out if evaluation else [])
    _write_data_facts(options.output_dir, options.dataset, data, evaluation, left_out)
    enforce(left_out, total, options.max_left_out, options.output_dir / artifacts.LEFT_OUT)
    planner = planner_over(run, data.lengths)
    eval_planner = replace(planner, lengths=evaluation.lengths) if evaluation and len(evaluation) else None
    if eval_planner is None and recipe.eval_strategy != "no":
        raise DataError("there is no question to compute the evaluation loss on", "pass --eval_strategy no")
    schedule = resolve_schedule(recipe, planner.steps_per_epoch)
    _tell_plan(run, schedule, data, planner)
    if is_main_process():
        artifacts.write_json(options.output_dir / artifacts.RECIPE, recipe.to_dict())
    return Plan(base, schedule, data, evaluation, planner, eval_planner, engine, cache, identity)


def planner_over(run: Run, lengths: tuple[GroupLengths, ...]) -> EpochPlanner:
    """The plan of the epochs that a run's settings give over some questions."""
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


def token_limits(options: TrainOptions, specs: list[DatasetSpec]) -> dict[str, int]:
    """The limits of answers that `--max_new_tokens` asks for, by benchmark.

    Raises:
        EvaluationError: it has mistakes, or names a benchmark that this run does not answer.
    """
    names = benchmark_names(dataset_text(specs))
    if options.eval_benchmarks not in (None, NO_BENCHMARKS):
        names += benchmark_names(str(options.eval_benchmarks))
    names += [guard.name for guard in parse_guards(options.guard)] if options.guard else []
    return parse_token_limits(options.max_new_tokens, list(dict.fromkeys(names)))


def limited(
    run: Run, tasks: list[Task], asked: ValidationPlan | None, prompt: PromptSettings, tokenizer: Any
) -> tuple[list[Task], ValidationPlan | None]:
    """Give what a run answers, at its end and at each evaluation, the limits of answers; too short ones are told."""
    limits = token_limits(run.options, run.specs)
    final = with_limits(tasks, prompt, tokenizer, limits)
    if asked is not None:
        asked = replace(asked, tasks=with_limits(asked.tasks, prompt, tokenizer, limits))
    for line in dict.fromkeys([*too_short(final), *too_short(asked.tasks if asked else ())]):
        warn(line)
        run.record.note(line)
    return final, asked


def find_run_base(options: TrainOptions, recipe: Recipe, specs: list[DatasetSpec]) -> Base:
    """Find the base model, fit its prompt to the answers of own data, and say what could not be had."""
    base = find_base(
        options.base_model,
        flash_attn=options.flash_attn,
        bf16=recipe.bf16,
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
        template=options.prompt_template,
        system=options.system,
        load_in_4bit=recipe.load_in_4bit,
    )
    prompt, notes = fitted(
        base.prompt, specs, base.processor.tokenizer, keep_template=options.prompt_template is not None,
        limits=token_limits(options, specs),
    )  # fmt: skip
    for note in (*base.notes, *notes):
        say(note)
    return replace(base, prompt=prompt)


def _write_data_facts(
    folder: Path, dataset: str, data: PreparedData, evaluation: PreparedData | None, left_out: list[LeftOut]
) -> None:
    """Write data.json and left_out.jsonl."""
    if not is_main_process():
        return
    reasons: dict[str, int] = {}
    for item in left_out:
        reasons[item.reason] = reasons.get(item.reason, 0) + 1
    facts = {"schema": 1, "dataset": dataset, "left_out": reasons}
    for name, part in (("train", data), ("eval", evaluation)):
        if part is not None:
            summary = part.summary()
            facts[name] = summary | {"synthetic": [key for key in summary["by_dataset"] if is_synthetic(key)]}
    artifacts.write_json(folder / artifacts.DATA, facts)
    artifacts.write_jsonl(folder / artifacts.LEFT_OUT, map(asdict, left_out))
    if left_out:
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        warn(f"{len(left_out)} samples are left out ({counts}); they are named in {folder / artifacts.LEFT_OUT}")


def _tell_plan(run: Run, schedule: Schedule, data: PreparedData, planner: EpochPlanner) -> None:
    """Print one supervised sample, the counts, and the schedule."""
    facts = data.summary()
    say("one sample as the model sees it; only the part in ⟦ ⟧ is supervised:")
    say("  " + data.marked_example().replace("\n", "\n  "))
    say(
        f"training set: {facts['samples']:,} questions on {facts['images']:,} images; {facts['supervised_tokens']:,} "
        f"supervised tokens, {facts['image_tokens']:,} image tokens"
    )
    say(
        f"schedule: {schedule.total_steps:,} steps of {planner.global_batch_size} questions "
        f"({schedule.steps_per_epoch:,} an epoch), warmup {schedule.warmup_steps}, evaluation every "
        f"{schedule.eval_steps or '-'}, checkpoint every {schedule.save_steps or '-'} steps"
    )
    for note in schedule.notes:
        say(f"note: {note}")
    if few := few_steps(run.recipe, schedule, planner):
        warn(few)
        run.record.note(few)


def few_steps(recipe: Recipe, schedule: Schedule, planner: EpochPlanner) -> str:
    """What to say where a run has too few optimizer steps to learn from; "" elsewhere."""
    questions, batch = planner.questions_per_epoch, planner.global_batch_size
    return few_steps_advice(recipe, schedule, questions, batch, planner.world_size)

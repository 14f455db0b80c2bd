"""One evaluation from the command line to the scores."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common import artifacts
from vlm_sft.common.console import is_main_process, say, warn
from vlm_sft.common.errors import EvaluationError, ModelError
from vlm_sft.common.idle import Idle
from vlm_sft.common.record import RunRecord, device_name
from vlm_sft.data.audit import enforce, left_out_line, note_lines, notes_of
from vlm_sft.data.oversized import LengthRule, lines, to_json
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import counted
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets, refuse_weights
from vlm_sft.distributed.collectives import barrier
from vlm_sft.distributed.launch import Launch, answer_tokens, connected, idle_gpus, quiet_libraries, read_launch
from vlm_sft.evaluate.backends import Backend, VllmBackend, require_vllm
from vlm_sft.evaluate.evaluator import Evaluator
from vlm_sft.evaluate.loading import open_backend
from vlm_sft.evaluate.metrics import Benchmark, Metric
from vlm_sft.evaluate.options import EvalOptions
from vlm_sft.evaluate.own_metrics import chosen_rules, with_metrics
from vlm_sft.evaluate.pictures import save_pictures
from vlm_sft.evaluate.provenance import PART, identity_of
from vlm_sft.evaluate.scoring import format_score
from vlm_sft.evaluate.tasks import (
    Task,
    fit_prompt,
    load_tasks,
    names_of,
    parse_token_limits,
    too_short,
    usable_tasks,
    with_limits,
)
from vlm_sft.model.caches import Caches
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.layout import empty_model
from vlm_sft.model.load import Base, find_base
from vlm_sft.model.saved_adapter import check_adapter_folder, recorded_bf16, require_fit
from vlm_sft.model.sharing_check import computation_of
from vlm_sft.model.vllm_rules import not_for_vllm, splitting_problem

IDLE = (
    Idle(("allow_prompt_mismatch",), lambda o: o.adapter is None, "without --adapter", "leave it out"),
    Idle(
        ("tokens_per_pack", "flash_attn", "cache_dir", "prepared_cache", "feature_cache", "shard_weights"),
        lambda o: o.backend == "vllm",
        "on --backend vllm, which reads, packs and keeps images itself",
        "leave it out",
    ),
    Idle(
        ("tensor_parallel_size",),
        lambda o: o.backend != "vllm",
        "without --backend vllm",
        "start several ranks with torchrun",
    ),
)


def evaluate(options: EvalOptions, metrics: Mapping[str, Metric] | None = None) -> dict[str, dict[str, Any]]:
    """Carry out one evaluation.

    Args:
        options: what is evaluated.
        metrics: further scores by name, of a caller from Python.

    Returns:
        For each benchmark the value of its results.json (on rank 0).

    Raises:
        VlmSftError: a mistake in the data, model, folder, prompt or launch.
    """
    quiet_libraries()
    names = names_of(_specs(options))
    limits = parse_token_limits(options.max_new_tokens, names)
    rules = chosen_rules(names, options.metric, options.judge, options.judge_model)
    launch = read_launch(options.local_rank, None)
    if options.backend == "vllm":
        _check_vllm(launch, options)
    # Under the deepspeed launcher too: an evaluation needs no ZeRO, every rank holds the model.
    place = artifacts.OutputFolder(
        options.output_dir,
        artifacts.RUN,
        artifacts.LEFT_OUT,
        artifacts.OVERSIZED,
        f"*/{artifacts.IDENTITY}",
        f"*/{PART.format('*')}",
    )
    with place.or_nothing(lambda: _answered(options.output_dir)), connected(launch):
        return _carry_out(options, launch, limits, rules, metrics or {})


def _specs(options: EvalOptions) -> list[DatasetSpec]:
    """The data sets to answer."""
    specs = parse_datasets(options.benchmark, options.columns)
    refuse_weights(specs, "every benchmark is scored for itself")
    return specs


def _answered(folder: Path) -> bool:
    """Whether a folder holds an answer."""
    files = [*folder.glob(f"*/{artifacts.PREDICTIONS}"), *folder.glob(f"*/{PART.format('*')}")]
    return any(path.stat().st_size for path in files)


def _carry_out(
    options: EvalOptions,
    launch: Launch,
    limits: dict[str, int],
    rules: Mapping[str, Benchmark],
    metrics: Mapping[str, Metric],
) -> dict[str, dict[str, Any]]:
    """Load, answer, score; returns as `evaluate` does."""
    base = _find_base(options)
    for note in filter(None, [idle_gpus(launch, sys.argv), *base.notes]):
        say(note)
    tasks, left_out = load_tasks(_specs(options), options.limit, options.split, rules)
    encoder = encoder_of(base)
    rule = _length_rule(options, base)
    total = sum(len(task.samples) for task in tasks)
    tasks, refused, too_long = usable_tasks(tasks, encoder, rule)
    left_out += refused
    tasks = with_metrics(with_limits(tasks, base.prompt, encoder.chat.plain, limits), metrics)
    questions = sum(len(task.samples) for task in tasks)
    who = f"{options.base_model} with {options.adapter}" if options.adapter else options.base_model
    say(
        f"evaluating {who} on {', '.join(task.name for task in tasks)}: "
        f"{counted([one for task in tasks for one in task.samples])}"
    )
    if is_main_process():
        artifacts.write_jsonl(options.output_dir / artifacts.LEFT_OUT, map(asdict, left_out))
    enforce(left_out, questions + len(left_out), options.max_left_out, options.output_dir / artifacts.LEFT_OUT)
    if left_out:
        warn(left_out_line(left_out))
    notes = note_lines(notes_of((sample for task in tasks for sample in task.samples), encoder.holds_control))
    for line in notes:
        say(line)
    if too_long and is_main_process():
        artifacts.write_jsonl(options.output_dir / artifacts.OVERSIZED, map(to_json, too_long))
    for line in [
        *too_short(tasks),
        *lines(too_long, rule, total, "benchmarks", str(options.output_dir / artifacts.OVERSIZED)),
    ]:
        warn(line)
    identity = identity_of(base, options.adapter) | rule.identity
    record = RunRecord(options.output_dir, _facts(options, launch, base))
    record.write()
    for line in notes:
        record.note(line)
    backend = _backend(options, base, launch, tasks, record)
    evaluator = _evaluator(options, launch, backend)
    results = {}
    for task in tasks:
        folder = options.output_dir / task.name
        results[task.name] = evaluator.run(task, folder, task.name, identity)
    if is_main_process():
        save_pictures(tasks, options.output_dir)
        record.finish("finished")
        for result in results.values():
            say(format_score(result))
        say(f"predictions and results: {options.output_dir}/<benchmark>/{artifacts.PREDICTIONS}")
        place = shlex.quote(str(options.output_dir))
        say(f"next: compare with another evaluation: vlm-sft compare OTHER {place} --baseline OTHER")
    barrier("end")
    return results


def _length_rule(options: EvalOptions, base: Base) -> LengthRule:
    """What is done with questions that are too long; says so where no flag does."""
    rule = LengthRule.recorded(base.prompt, base.context, options.max_length, options.oversized)
    if rule.text and (options.max_length, options.oversized) == (None, None):
        say(f"questions that are too long: {rule.text}, as in the training (the same flags say otherwise)")
    return rule


def _check_vllm(launch: Launch, options: EvalOptions) -> None:
    """Refuse the vLLM backend where it cannot run.

    Raises:
        ModelError: vLLM is not installed.
        EvaluationError: it was started as several ranks, 4-bit weights are asked for, or more GPUs than there are.
    """
    require_vllm()
    if options.load_in_4bit:
        raise EvaluationError("--backend vllm holds weights in their own format", "leave --load_in_4bit out")
    if launch.world_size > 1:
        raise EvaluationError(
            f"--backend vllm runs as one process, not as {launch.world_size} ranks",
            f"start it with plain vlm-sft eval; --tensor_parallel_size {launch.world_size} splits the model over GPUs",
        )
    gpus, visible = options.tensor_parallel_size, torch.cuda.device_count()
    if gpus < 1 or gpus > max(1, visible):
        raise EvaluationError(
            f"--tensor_parallel_size {gpus}: this process sees {visible} GPU{'' if visible == 1 else 's'}",
            f"pass 1 to {visible}" if visible > 1 else "leave it out",
        )


def _facts(options: EvalOptions, launch: Launch, base: Base) -> dict[str, object]:
    """What run.json says."""
    return {
        "base_model": options.base_model,
        "adapter": str(options.adapter) if options.adapter else None,
        "dataset": options.benchmark,
        "limit": options.limit,
        "split": options.split,
        "device": device_name(),
        "world_size": launch.world_size,
        "dtype": base.dtype_name,
        "load_in_4bit": base.load_in_4bit,
        "backend": options.backend,
        **({"tensor_parallel_size": options.tensor_parallel_size} if options.backend == "vllm" else {}),
    }


def _evaluator(options: EvalOptions, launch: Launch, backend: Backend) -> Evaluator:
    tokens = options.tokens_per_pack or answer_tokens(launch, backend.blockwise)
    return Evaluator(backend, tokens, launch.rank, launch.world_size)


def _backend(options: EvalOptions, base: Base, launch: Launch, tasks: list[Task], record: RunRecord) -> Backend:
    """Load what answers; images and their vision features come from the cache, as in the evaluation of a training."""
    if options.backend == "vllm":
        return VllmBackend(base, options.adapter, options.tensor_parallel_size)
    caches = Caches(options.caches, launch, base.name, base.path)
    samples = [sample for task in tasks for sample in task.samples]
    backend, cache = open_backend(base, options.adapter, launch, options.shard_weights, caches, samples)
    caches.describe([cache])
    record.update(engine=caches.facts, **computation_of(base, backend.model))
    return backend


def _find_base(options: EvalOptions) -> Base:
    """Find the base, with the prompt and image settings that travel with the adapter.

    Raises:
        EvaluationError: a flag differs from what the adapter was trained with, and that is not allowed.
        ModelError: the adapter or the base cannot be found, or they do not belong together.
    """
    config = check_adapter_folder(options.adapter) if options.adapter else {}
    saved = PromptSettings.find(options.adapter) if options.adapter else None
    base = find_base(
        options.base_model,
        flash_attn=options.flash_attn,
        bf16=recorded_bf16(options.adapter or Path(options.base_model)),
        prompt=saved,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        template=options.prompt_template,
        system=options.system,
        load_in_4bit=options.load_in_4bit,
    )
    gpus = options.tensor_parallel_size
    problem = splitting_problem(gpus, empty_model(base.path).config) if gpus > 1 else None
    if problem:
        raise ModelError(
            f"--tensor_parallel_size {gpus}: {options.base_model}: {problem}", "pass a number that divides them"
        )
    if options.adapter:
        contents = require_fit(options.adapter, base, options.allow_other_base)
        problems = not_for_vllm(config, contents.layers, empty_model(base.path)) if options.backend == "vllm" else ()
        if problems:
            raise ModelError(f"--adapter {options.adapter}: {'; '.join(problems)}", "leave --backend vllm out")
    if options.adapter and saved is None:
        warn(f"{options.adapter} has no {artifacts.PROMPT}: the prompt of its training is unknown")
    if saved is None:
        base = fit_prompt(base, _specs(options), options.prompt_template is not None)
    changed = saved.differences(base.prompt) if saved else []
    if changed and not options.allow_prompt_mismatch:
        raise EvaluationError(
            f"--adapter {options.adapter} was trained with another prompt: {'; '.join(changed)}",
            "leave these flags out, or pass --allow_prompt_mismatch to see what another prompt does",
        )
    if changed:
        warn(f"the prompt is not that of the training: {'; '.join(changed)}")
    return base

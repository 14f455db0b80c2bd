"""What an evaluation asks: benchmarks, questions, limits of the answers.

A published benchmark has the limit that its authors use; that of own data follows from its answers. So does whether its
questions ask for a word or phrase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_sft.common.errors import DataError, EvaluationError, quoted
from vlm_sft.data.answer_limits import fitted, limit_for, longest_answer, room_for
from vlm_sft.data.audit import check_images
from vlm_sft.data.chat import Chat
from vlm_sft.data.dataset import usable_samples
from vlm_sft.data.encode import Encoder
from vlm_sft.data.mixture import stratified_limit
from vlm_sft.data.oversized import LengthRule, Oversized, fit
from vlm_sft.data.plain_text import PlainText
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import RECORD, LeftOut, Sample
from vlm_sft.data.sources.jsonl import answer_texts
from vlm_sft.data.sources.registry import benchmark_split, is_synthetic, load_split
from vlm_sft.data.sources.spec import HUB, STREAM, DatasetSpec, is_own
from vlm_sft.distributed.collectives import gather
from vlm_sft.evaluate.items import why_unusable
from vlm_sft.evaluate.metrics import BENCHMARKS, Benchmark
from vlm_sft.model.load import Base

NO_QUESTION = "choose another split"
SAMPLE_SEED = 0  # of `limit`: fixed, so that every model is asked the same questions


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark to evaluate.

    Attributes:
        name: folder name and label, e.g. "chartqa", or the label of the user's own data.
        benchmark: the rules.
        samples: the questions; the sizes of their images are known.
        synthetic: whether the images are generated.
        max_new_tokens: limit of an answer in tokens; `with_limits` sets it once the tokenizer is known.
        answer_tokens: tokens of the longest answer that is expected; 0 while not known.
        source: the user's own data, in all its splits; None for other benchmarks.
    """

    name: str
    benchmark: Benchmark
    samples: list[Sample]
    synthetic: bool
    max_new_tokens: int
    answer_tokens: int = 0
    source: DatasetSpec | None = None


def dataset_text(specs: list[DatasetSpec]) -> str:
    """The data sets again in the grammar of `--benchmark`, without weights."""
    return ",".join(map(_entry_text, specs))


def _entry_text(spec: DatasetSpec) -> str:
    name = f"{HUB}{spec.hub}" if spec.hub else spec.name
    if spec.stream is not None:
        return f"{name}@{STREAM}"
    if spec.path is None:
        return name
    # A folder of the user's own takes no label.
    return str(spec.path) if spec.own and spec.path.is_dir() else f"{spec.name}@{spec.path}"


def names_of(specs: Iterable[DatasetSpec]) -> list[str]:
    """The names of the benchmarks that data sets are; "demo" stands for its two parts."""
    return [name for spec in specs for name in _parts(spec)]


def rules_of(name: str, own: Mapping[str, Benchmark] | None = None) -> Benchmark:
    """The rules of a benchmark.

    Args:
        name: of the benchmark.
        own: those of the user's own data, from `parse_metrics`; exact match for data that is not in it.
    """
    return (own or {}).get(name) or BENCHMARKS["exact_match" if is_own(name) else name]


def _parts(spec: DatasetSpec) -> list[str]:
    return ["demo_charts", "demo_text"] if spec.name == "demo" else [spec.name]


def load_tasks(
    specs: Sequence[DatasetSpec],
    limit: int | None,
    split: str | None = None,
    own_rules: Mapping[str, Benchmark] | None = None,
) -> tuple[list[Task], list[LeftOut]]:
    """Load the questions of the benchmarks, and look at every image.

    Args:
        specs: the data sets; "demo" stands for its two parts.
        limit: at most so many questions a benchmark, a seeded stratified sample; None for all.
        split: "train", "validation" or "test"; the benchmark's own when None.
        own_rules: those of the user's own data, by name.

    Returns:
        The tasks, and what cannot be asked. A question whose image is broken is drawn and then left out, so the others
        are the same as with a sound image.

    Raises:
        DataError: a data set cannot be loaded, has no question, or is not the same on all ranks.
        EvaluationError: the rule of own data cannot score it.
    """
    tasks: list[Task] = []
    left_out: list[LeftOut] = []
    for spec in specs:
        for name in _parts(spec):
            at_most = limit if spec.stream is not None else None  # generated benchmarks are sampled like the others
            part, rules = replace(spec, name=name, weight=None), rules_of(name, own_rules)
            loaded = load_split(part, split or benchmark_split(name), at_most)
            sound, broken = check_images(stratified_limit(loaded.samples, limit, SAMPLE_SEED))
            left_out += [*loaded.left_out, *broken]
            if not sound:
                raise DataError(f"{name} has no question to evaluate", NO_QUESTION)
            own = part if part.own else None
            if own:
                _require_scorable(rules, sound)
            tasks.append(Task(name, rules, sound, is_synthetic(name), rules.max_new_tokens, source=own))
    require_same_data((sample for task in tasks for sample in task.samples), left_out)
    return tasks, left_out


def _require_scorable(rules: Benchmark, samples: Sequence[Sample]) -> None:
    """Make sure that a rule can score own questions, before any is asked.

    Raises:
        EvaluationError: it cannot; the first one is named with its place.
    """
    for sample in samples:
        row = {"id": sample.id, "question": sample.question, "prediction": "", "answers": list(sample.answers)}
        row |= facts_of(sample, rules)
        if reason := why_unusable(row, rules):
            what = f"{sample.metadata.get('where', sample.id)}: {reason}"
            raise EvaluationError(f"--metric {rules.metric_name} cannot score {rules.name}: {what}", "mend the record")
    if rules.own_function:  # a mistake in the user's function shows on the first reference, not after all answers
        first = samples[0]
        row = {"id": first.id, "question": first.question, "split": first.split, "prediction": first.target}
        rules.score(first.target, first.answers, row | {"answers": list(first.answers), **facts_of(first, rules)})


def facts_of(sample: Sample, rules: Benchmark) -> dict[str, Any]:
    """What a rule needs of a question besides its answers, as predictions hold it; a user's own gets all there is."""
    known = {**sample.metadata.get(RECORD, {}), **sample.metadata}
    own = sample.metadata.get(RECORD, {}) if rules.own_function else {}
    return own | {key: known[key] for key in rules.needs if known.get(key)}


def require_same_data(samples: Iterable[Sample], left_out: Sequence[LeftOut]) -> None:
    """Make sure that all ranks have loaded the same questions, since each of them plans the steps by itself.

    All ranks must call it.

    Raises:
        DataError: a rank has others, because of files that only its machine lacks, or that only it could not read.
    """
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.id} {sample.image_key}\n".encode("utf-8", "surrogatepass"))
    ranks = gather((digest.hexdigest(), {item.id: item.detail for item in left_out}))
    if len({found for found, _ in ranks}) == 1:
        return
    everywhere = set.intersection(*(set(items) for _, items in ranks))
    alone = [(rank, items[name]) for rank, (_, items) in enumerate(ranks) for name in sorted(set(items) - everywhere)]
    example = f", e.g. rank {alone[0][0]} cannot use a sample that others can: {alone[0][1]}" if alone else ""
    raise DataError(
        f"the ranks do not have the same questions{example}",
        "give every machine the same data at the same path, and look at its disk",
    )


def usable_tasks(
    tasks: list[Task], encoder: Encoder, rule: LengthRule
) -> tuple[list[Task], list[LeftOut], list[Oversized]]:
    """Leave out the questions that a model's processor cannot take, and treat those that are too long.

    Returns:
        The tasks, what cannot or shall not be asked, and the questions that are too long, asked or not.

    Raises:
        DataError: a task has no question left.
        ModelError: the processor fails on every image.
    """
    kept, left_out, found = [], [], []
    for task in tasks:
        usable, refused = usable_samples(encoder, task.samples)
        fitted = fit(usable, encoder, rule, task.name)
        gone = [*refused, *fitted.left_out]
        if not fitted.samples:
            raise DataError(f"{task.name} has no question that can be asked; the first: {gone[0].detail}", NO_QUESTION)
        kept.append(replace(task, samples=fitted.samples))
        left_out += gone
        found += fitted.found
    return kept, left_out, found


def fit_prompt(
    base: Base, specs: Sequence[DatasetSpec], keep_template: bool, limits: Mapping[str, int] | None = None
) -> Base:
    """Fit the prompt of a base to the answers of own data, see `answer_limits`; what the user should know is noted.

    Args:
        base: with the prompt that it comes with.
        specs: the data sets; without own data the base stays as it is.
        keep_template: the user gave a template.
        limits: of answers that the user asked for, by data set.

    Raises:
        DataError: own data cannot be read.
        ModelError: the base has no usable chat template.
    """
    plain = Chat(base.processor, base.stop_ids).plain if any(spec.own for spec in specs) else None
    prompt, notes = fitted(base.prompt, specs, plain, keep_template=keep_template, limits=limits)
    return replace(base, prompt=prompt, notes=(*base.notes, *notes))


def with_limits(
    tasks: Sequence[Task], prompt: PromptSettings, plain: PlainText | None, asked: Mapping[str, int]
) -> list[Task]:
    """Give every task the limit of its answers.

    Args:
        tasks: from `load_tasks`.
        prompt: that of the model which answers.
        plain: of the model; None estimates.
        asked: limits that the user asked for, by benchmark, from `parse_token_limits`.

    Raises:
        DataError: own data cannot be read.
    """
    found = []
    for task in tasks:
        if task.source is None:
            longest = longest_answer({sample.target for sample in task.samples}, plain)
            limit = task.benchmark.max_new_tokens
        else:
            longest = longest_answer(answer_texts(task.source)[1], plain)
            limit = limit_for(prompt, longest)
        found.append(replace(task, max_new_tokens=asked.get(task.name, limit), answer_tokens=longest))
    return found


def too_short(tasks: Sequence[Task]) -> list[str]:
    """Name the tasks that expect answers which their limit does not hold, one sentence each."""
    return [
        f"{task.name}: an answer may take {task.max_new_tokens} tokens, and the longest expected one has "
        f"{task.answer_tokens}: it cannot be right; pass --max_new_tokens {task.name}={room_for(task.answer_tokens)}"
        for task in tasks
        if task.answer_tokens > task.max_new_tokens
    ]


def parse_token_limits(text: str | None, names: list[str]) -> dict[str, int]:
    """Read `--max_new_tokens`: one number for all benchmarks, or `chartqa=32,textvqa=16`.

    Args:
        text: the flag, or None.
        names: the benchmarks of this evaluation.

    Returns:
        For those of `names` that are asked for the limit of an answer in tokens; the others keep their own.

    Raises:
        EvaluationError: every mistake together: no positive number, or a benchmark that is not evaluated.
    """
    limits: dict[str, int] = {}
    mistakes = []
    for entry in text.split(",") if text is not None else []:
        name, equals, value = entry.rpartition("=")
        targets = [name.strip()] if equals else names
        if not value.strip().isdecimal() or int(value) < 1:
            mistakes.append(f"{quoted(entry.strip())} is not a positive number of tokens")
        elif not equals and text != entry:
            mistakes.append(f"{quoted(entry.strip())} names no benchmark")
        elif targets[0] not in names:
            mistakes.append(f"{quoted(targets[0])} is not evaluated")
        else:
            limits |= dict.fromkeys(targets, int(value))
    if mistakes:
        raise EvaluationError(
            f"--max_new_tokens {text}: {'; '.join(mistakes)}",
            f"pass one number, or BENCHMARK=NUMBER of {', '.join(names)}, comma separated",
        )
    return limits

"""How long the answers of a run may be, where the user says so."""

from __future__ import annotations

from dataclasses import replace

from vlm_sft.common.console import warn
from vlm_sft.data.plain_text import PlainText
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.evaluate.tasks import Task, parse_token_limits, too_short, with_limits
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan, answered_names


def token_limits(options: TrainOptions, specs: list[DatasetSpec]) -> dict[str, int]:
    """The limits of answers that `--max_new_tokens` asks for, by benchmark.

    Raises:
        EvaluationError: it has mistakes, or names a benchmark that this run does not answer.
    """
    return parse_token_limits(options.max_new_tokens, answered_names(options, specs))


def with_token_limits(
    run: TrainingRun,
    tasks: list[Task],
    validation: ValidationPlan | None,
    prompt: PromptSettings,
    plain: PlainText | None,
) -> tuple[list[Task], ValidationPlan | None]:
    """Limit the answers of the final evaluation and of the validation; warn of limits that are too short."""
    limits = token_limits(run.options, run.specs)
    final = with_limits(tasks, prompt, plain, limits)
    if validation is not None:
        validation = replace(validation, tasks=with_limits(validation.tasks, prompt, plain, limits))
    for line in dict.fromkeys([*too_short(final), *too_short(validation.tasks if validation else ())]):
        warn(line)
        run.record.note(line)
    return final, validation

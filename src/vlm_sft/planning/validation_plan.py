"""Which questions are answered during a training, and what a checkpoint may lose elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_sft.common.errors import DataError, RecipeError
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.spec import DatasetSpec, parse_beside
from vlm_sft.evaluate.guard import Guard, parse_guards
from vlm_sft.evaluate.tasks import Task, dataset_text, load_tasks, names_of, rules_of
from vlm_sft.recipe.metric_names import LOSS, is_loss, loss_set
from vlm_sft.recipe.schema import Recipe

EVAL_SAMPLES = 200  # questions per benchmark at each evaluation


@dataclass(frozen=True)
class ValidationPlan:
    """What is answered at each evaluation.

    Attributes:
        tasks: the questions; those of the training data first.
        guards: what may be lost on which of them.
        metric: what chooses the best checkpoint, as of `metric_for_best_model`.
    """

    tasks: list[Task]
    guards: list[Guard]
    metric: str

    @property
    def samples(self) -> list[Sample]:
        """The questions of all tasks."""
        return [sample for task in self.tasks for sample in task.samples]


def check_request(recipe: Recipe, specs: list[DatasetSpec], guard: str | None, samples: int | None) -> list[Guard]:
    """Check metric, guards and number of samples before anything is loaded.

    Args:
        recipe: says which metric chooses the best checkpoint.
        specs: the training data.
        guard: the value of `--guard`, or None.
        samples: the value of `--eval_samples`, or None.

    Returns:
        The guards.

    Raises:
        RecipeError: the metric belongs to no benchmark of the data, a guard has nothing to choose from, or the number
            of samples is below 1.
        EvaluationError, DataError: the guard argument has mistakes.
    """
    known = {name: rules_of(name).metric_name for name in names_of(specs)}
    metric = recipe.metric_for_best_model
    losses = [f"{LOSS}_{name}" for name in known] if len(known) > 1 else []
    if metric not in (have := [LOSS, *losses, *known.values()]):
        kind = "data set beside others" if is_loss(metric) else "benchmark"
        raise RecipeError(
            f"metric_for_best_model {metric} is of no {kind} in --dataset {dataset_text(specs)}",
            f"choose from {', '.join(dict.fromkeys(have))}",
        )
    if samples is not None and samples < 1:
        raise RecipeError(f"--eval_samples {samples} is below 1", "give a number of questions per benchmark")
    if (guard or samples) and recipe.eval_strategy == "no":
        flag = "--guard" if guard else "--eval_samples"
        raise RecipeError(f"{flag} needs evaluations, and eval_strategy is no", "use eval_strategy steps or epoch")
    if guard and not recipe.load_best_model_at_end:
        raise RecipeError(
            "--guard decides which checkpoint is kept, and load_best_model_at_end is false",
            "pass --load_best_model_at_end true with save_steps equal to eval_steps",
        )
    return parse_guards(guard, specs) if guard else []


def of_metric(metric: str, evaluation: Sequence[Sample]) -> list[Sample]:
    """The questions of the evaluation loss that a metric looks at.

    Raises:
        DataError: the metric is the loss of a data set, and no question is that set's.
    """
    name = loss_set(metric)
    found = [sample for sample in evaluation if is_loss(metric) and name in ("", sample.dataset)]
    if name and not found:
        raise DataError(
            f"metric_for_best_model {metric}: no question of the evaluation loss is of {name}",
            "let --max_eval draw more questions, give the set a validation split, or choose another metric",
        )
    return found


def plan_validation(
    recipe: Recipe, specs: list[DatasetSpec], guards: list[Guard], samples: int | None
) -> tuple[ValidationPlan | None, list[LeftOut]]:
    """Load the questions that are answered at each evaluation.

    Args:
        recipe, specs, samples: as in `check_request`.
        guards: what it returned.

    Returns:
        The plan, or None where neither a metric nor a guard nor a number of samples asks for one; what was left out.
    """
    if is_loss(recipe.metric_for_best_model) and not guards and samples is None:
        return None, []
    limit = samples or EVAL_SAMPLES
    tasks, left_out = load_tasks(specs, limit, "validation")
    have = {task.name for task in tasks}
    for source in dict.fromkeys(guard.source for guard in guards if guard.name not in have):
        more, broken = load_tasks(parse_beside(source, specs), limit, "validation")
        tasks += [task for task in more if task.name not in have]
        left_out += broken
    return ValidationPlan(tasks, guards, recipe.metric_for_best_model), left_out

"""Which questions are answered during a training, and what a checkpoint may lose elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_sft.common.errors import DataError, RecipeError
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.spec import DatasetSpec, parse_beside
from vlm_sft.evaluate.guard import Guard, parse_guards
from vlm_sft.evaluate.metrics import Benchmark
from vlm_sft.evaluate.own_metrics import chosen_rules
from vlm_sft.evaluate.tasks import Task, dataset_text, load_tasks, names_of, rules_of
from vlm_sft.planning.options import TrainOptions
from vlm_sft.recipe.metric_names import LOSS, is_loss, loss_set
from vlm_sft.recipe.schema import Recipe

EVAL_SAMPLES = 200  # questions per benchmark at each evaluation
NO_BENCHMARKS = "none"


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


def answered_names(options: TrainOptions, specs: list[DatasetSpec]) -> list[str]:
    """The benchmarks that a run answers, at its evaluations or at its end.

    Raises:
        EvaluationError, DataError: they are written with mistakes.
    """
    names = names_of(specs)
    if options.eval_benchmarks not in (None, NO_BENCHMARKS):
        names += names_of(parse_beside(str(options.eval_benchmarks), specs))
    names += [guard.name for guard in parse_guards(options.guard, specs)] if options.guard else []
    return list(dict.fromkeys(names))


def own_rules(options: TrainOptions, specs: list[DatasetSpec]) -> dict[str, Benchmark]:
    """The rules that `--metric` and `--judge` give to what a run answers.

    Raises:
        EvaluationError, DataError: it has mistakes, or names what this run does not answer.
    """
    return chosen_rules(answered_names(options, specs), options.metric, options.judge, options.judge_model)


def check_request(recipe: Recipe, specs: list[DatasetSpec], options: TrainOptions) -> list[Guard]:
    """Check metric, guards and number of samples before anything is loaded.

    Args:
        recipe: says which metric chooses the best checkpoint.
        specs: the training data.
        options: has the guards, the number of samples and the metric of own data.

    Returns:
        The guards.

    Raises:
        RecipeError: the metric belongs to no benchmark of the data, a guard has nothing to choose from, or the number
            of samples is below 1.
        EvaluationError, DataError: the argument of guards or metrics has mistakes.
    """
    guard, samples, rules = options.guard, options.eval_samples, own_rules(options, specs)
    known = {name: rules_of(name, rules).metric_name for name in names_of(specs)}
    metric = recipe.metric_for_best_model
    losses = [f"{LOSS}_{name}" for name in known] if len(known) > 1 else []
    if metric not in (have := [LOSS, *losses, *known.values()]):
        kind = "data set beside others" if is_loss(metric) else "benchmark"
        raise RecipeError(
            f"metric_for_best_model {metric} is of no {kind} in --dataset {dataset_text(specs)}",
            f"choose from {', '.join(dict.fromkeys(have))}"
            + ("; --metric gives your own data another" if any(spec.own for spec in specs) else ""),
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
    recipe: Recipe, specs: list[DatasetSpec], guards: list[Guard], options: TrainOptions
) -> tuple[ValidationPlan | None, list[LeftOut]]:
    """Load the questions that are answered at each evaluation.

    Args:
        recipe, specs, options: as in `check_request`.
        guards: what it returned.

    Returns:
        The plan, or None where neither a metric nor a guard nor a number of samples asks for one; what was left out.
    """
    samples, rules = options.eval_samples, own_rules(options, specs)
    if is_loss(recipe.metric_for_best_model) and not guards and samples is None:
        return None, []
    limit = samples or EVAL_SAMPLES
    tasks, left_out = load_tasks(specs, limit, "validation", rules)
    have = {task.name for task in tasks}
    for source in dict.fromkeys(guard.source for guard in guards if guard.name not in have):
        more, broken = load_tasks(parse_beside(source, specs), limit, "validation", rules)
        tasks += [task for task in more if task.name not in have]
        left_out += broken
    return ValidationPlan(tasks, guards, recipe.metric_for_best_model), left_out

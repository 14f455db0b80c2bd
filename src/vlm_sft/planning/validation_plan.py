"""Which questions are answered during a training, and what a checkpoint may lose elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_sft.common.console import warn
from vlm_sft.common.errors import DataError, RecipeError
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.spec import DatasetSpec, parse_beside
from vlm_sft.data.sources.splits import MissingSplitError
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
        tasks: the questions; those of the training data first, then those that a guard or the metric needs besides.
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
        options: has the guards, the benchmarks of the end, the number of samples and the metric of own data.

    Returns:
        The guards.

    Raises:
        RecipeError: the metric belongs to nothing that is answered, a guard has nothing to choose from, or the number
            of samples is below 1.
        EvaluationError, DataError: the argument of guards or metrics has mistakes.
    """
    guard, samples, rules = options.guard, options.eval_samples, own_rules(options, specs)
    known = [rules_of(name, rules).metric_name for name in answered_names(options, specs)]
    metric, trained = recipe.metric_for_best_model, names_of(specs)
    losses = [f"{LOSS}_{name}" for name in trained] if len(trained) > 1 else []
    if metric not in (have := [LOSS, *losses, *known]):
        kind = "data set beside others" if is_loss(metric) else "benchmark"
        where = "" if is_loss(metric) else ", --eval_benchmarks or --guard"
        raise RecipeError(
            f"metric_for_best_model {metric} is of no {kind} in --dataset {dataset_text(specs)}{where}",
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
    beside = {spec.name: spec for guard in guards for spec in parse_beside(guard.source, specs)}
    metric = recipe.metric_for_best_model
    if not is_loss(metric) and metric not in _metrics_of([*specs, *beside.values()], rules):
        ending = parse_beside(str(options.eval_benchmarks), specs)  # only there, as `check_request` has seen
        beside |= {spec.name: spec for spec in ending if metric in _metrics_of([spec], rules)}
    have = {task.name for task in tasks}
    for spec in (spec for spec in beside.values() if not have.issuperset(names_of([spec]))):
        more, broken = _questions_beside(spec, limit, rules)
        tasks += [task for task in more if task.name not in have]
        left_out += broken
    return ValidationPlan(tasks, guards, metric), left_out


def _metrics_of(specs: Sequence[DatasetSpec], rules: Mapping[str, Benchmark]) -> list[str]:
    """The metrics of the benchmarks that data sets are."""
    return [rules_of(name, rules).metric_name for name in names_of(specs)]


def _questions_beside(
    spec: DatasetSpec, limit: int, rules: Mapping[str, Benchmark]
) -> tuple[list[Task], list[LeftOut]]:
    """The validation questions of what is not trained on; of its test split, with a word, where it has no other."""
    try:
        return load_tasks([spec], limit, "validation", rules)
    except MissingSplitError:
        found = load_tasks([spec], limit, "test", rules)
    warn(f"{spec.name}: there are test questions only, and they help to choose the best checkpoint")
    return found

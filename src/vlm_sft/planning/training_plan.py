"""From the command line of a run to all that its training will do: data, questions, packs."""

from __future__ import annotations

from vlm_sft.evaluate.guard import Guard
from vlm_sft.evaluate.tasks import Task
from vlm_sft.planning.answer_limits import with_token_limits
from vlm_sft.planning.pack_choice import pack_plan
from vlm_sft.planning.run_plan import Plan, final_tasks, fit_questions, load_data, prepare, tell_parts, validation_plan
from vlm_sft.planning.sample_lengths import length_rule
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan


def plan_training(run: TrainingRun, guards: list[Guard]) -> tuple[TrainingRun, Plan, ValidationPlan | None, list[Task]]:
    """Load the data and decide what the training will do; says and records it.

    Args:
        run: as it was asked for.
        guards: benchmarks that a checkpoint may not lose.

    Returns:
        The run with the size of its packs, its plan, the questions of each evaluation (None where the evaluation loss
        is all), and the benchmarks of the final evaluation.

    Raises:
        VlmSftError: data or base model cannot be used.
    """
    with run.record.timed("data"):
        train_samples, eval_samples, left_out = load_data(run.specs, run.recipe, run.options.loss_weights)
        tasks = final_tasks(run)
        validation = validation_plan(run, guards)
        tell_parts(run, train_samples, eval_samples, validation, tasks)
    with run.record.timed("load"):
        plan = prepare(run, train_samples, eval_samples, left_out)
        rule = length_rule(run.recipe, plan.base)
        tasks, validation = fit_questions(run, tasks, validation, plan.data.encoder, rule)
        tasks, validation = with_token_limits(run, tasks, validation, plan.base.prompt, plan.data.encoder.chat.plain)
    run, plan = pack_plan(run, plan)
    return run, plan, validation, tasks

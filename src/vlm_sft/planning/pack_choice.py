"""The size of packs and gradient checkpointing of a run, decided alike by `train` and `plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vlm_sft.common.console import detail
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.distributed.collectives import agree
from vlm_sft.forecast.pack_size import PACK_TOKENS, Passes, choose_passes
from vlm_sft.forecast.setting import Setting
from vlm_sft.planning.device_rates import rates_here
from vlm_sft.planning.options import AUTO
from vlm_sft.planning.run_plan import Plan
from vlm_sft.planning.run_setting import setting_of, shape_of
from vlm_sft.planning.training_run import TrainingRun


def decide_passes(
    run: TrainingRun, setting: Callable[[], Setting], planner: EpochPlanner, visual: Sequence[int]
) -> TrainingRun:
    """Decide what the recipe leaves open, say it and record it.

    Args:
        run: a run without `passes`.
        setting: gives the setting of the run; called on GPUs only.
        planner, visual: the plan of the epochs, and the visual tokens of every image.

    Returns:
        The run with `passes`.
    """
    passes = agree(lambda: _passes(run, setting, planner, visual))
    if passes.reason:
        detail(f"passes: {passes.reason}")
    run.record.update(passes=passes.to_dict())
    return replace(run, passes=passes)


def _passes(run: TrainingRun, setting: Callable[[], Setting], planner: EpochPlanner, visual: Sequence[int]) -> Passes:
    wanted, tokens = run.recipe.gradient_checkpointing, run.recipe.tokens_per_pack
    if wanted != AUTO and tokens is not None:
        return Passes(tokens, bool(wanted))
    if run.launch.cpu:
        # What a CPU has free is not known, and computing twice is slower than a smaller pack.
        return Passes(run.tokens_per_pack, wanted is True)
    budgets = PACK_TOKENS if tokens is None else (tokens,)
    choices = (False, True) if wanted == AUTO else (bool(wanted),)
    return choose_passes(setting(), planner, visual, budgets, choices)


def pack_plan(run: TrainingRun, plan: Plan) -> tuple[TrainingRun, Plan]:
    """Decide the passes of a training, and pack its plan accordingly."""

    def setting() -> Setting:
        shape, dtype = shape_of(plan.base), plan.base.dtype
        return setting_of(run, shape, torch.finfo(dtype).bits // 8, rates_here(shape, dtype), plan.base.flash)

    run = decide_passes(run, setting, plan.planner, plan.data.visual_tokens)
    evaluation = replace(plan.eval_planner, tokens_per_pack=run.tokens_per_pack) if plan.eval_planner else None
    planner = replace(plan.planner, tokens_per_pack=run.tokens_per_pack)
    return run, replace(plan, planner=planner, eval_planner=evaluation)

"""AdamW of bitsandbytes: moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), or in memory that is paged.

Paged moments leave a GPU for the host's memory where they do not fit, and come back for the step (Dettmers et al. 2023,
arXiv:2305.14314). A CPU has nowhere to page them to.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch

from vlm_sft.common.errors import RecipeError
from vlm_sft.distributed.launch import Launch
from vlm_sft.recipe.schema import BITSANDBYTES, Recipe

_MOMENTS = ("state1", "state2")


def require_bitsandbytes(recipe: Recipe, launch: Launch) -> None:
    """Check, before anything is loaded, that the recipe's optimizer can be had.

    Raises:
        RecipeError: bitsandbytes is not installed, or DeepSpeed keeps the optimizer's state.
    """
    if recipe.optim not in BITSANDBYTES:
        return
    if launch.deepspeed is not None:
        raise RecipeError(
            f"optim {recipe.optim}: under --deepspeed the engine holds AdamW's state itself, in float32, a part a rank",
            "use optim adamw_torch_fused with it, or leave --deepspeed out",
        )
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"optim {recipe.optim}: the package bitsandbytes is not installed",
            "pip install 'vlm-sft[qlora]', or use optim adamw_torch_fused",
        )


def make_bitsandbytes_adamw(
    model: torch.nn.Module, groups: list[dict[str, Any]], recipe: Recipe
) -> torch.optim.Optimizer:
    """The recipe's optimizer, one of `BITSANDBYTES`.

    Tensors of less than 4,096 numbers, and embeddings (whose gradients are sparse), keep moments of 32 bits.

    Args:
        model: has the embeddings.
        groups: the trained parameters, with their weight decay and learning rate.
        recipe: of the run.
    """
    from bitsandbytes import optim

    # On a CPU the moments are held as other optimizers hold theirs; the forecast counts them so.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()  # it remembers places of parameters, and another training of this process had others
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    made: torch.optim.Optimizer = kinds[recipe.optim](
        groups, lr=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2), eps=recipe.adam_epsilon
    )
    return made


def page_moments(optimizer: Any) -> None:
    """Put moments that were read from a checkpoint where the optimizer would have made them.

    bitsandbytes moves what it reads to the device and does not page it again, so that a resumed training would need
    memory that the first one did not.

    Args:
        optimizer: from `make_bitsandbytes_adamw`, its state just loaded.
    """
    for parameter, state in optimizer.state.items():
        for name in _MOMENTS:
            buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
            state[name] = buffer.copy_(state[name])

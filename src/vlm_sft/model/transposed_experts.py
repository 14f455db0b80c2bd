"""Expert weights that transformers transposes while it loads them, under ZeRO-3.

A checkpoint may hold the fused weights of experts transposed (Qwen3-VL-MoE). transformers recognises that by the shape
of the model's own parameter, which ZeRO-3 replaces by an empty one: all weights would be transposed, and some refused.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm_sft.model.hub import model_config


class _TransposeToFit(Transpose):
    """Transposes a weight that does not have the shape of its whole parameter."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, torch.Tensor], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        """Transpose one weight where it has to be; by its name, though transformers annotates lists."""
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        found = next(iter(input_dict.values()))
        weight = found[0] if isinstance(found, list) else found
        if tuple(weight.shape) != tuple(getattr(parameter, "ds_shape", parameter.shape)):
            weight = weight.transpose(self.dim0, self.dim1).contiguous()
        return {self.get_target_pattern(input_dict, source_patterns, target_patterns): weight}


def compare_whole_shapes(path: str) -> None:
    """Compare weights that may be transposed with the shapes of whole parameters, in a process that partitions them.

    Args:
        path: of the model that will be loaded.
    """
    if not is_deepspeed_zero3_enabled():
        return
    config = model_config(str(path))
    for kind in (config.model_type, *(part.model_type for part in _parts(config))):
        mapping = get_checkpoint_conversion_mapping(kind) or []
        checking = [step for step in mapping if any(_checks_shape(work) for work in getattr(step, "operations", ()))]
        for step in checking:
            step.operations = [
                _TransposeToFit(work.dim0, work.dim1, check_dims=True) if _checks_shape(work) else work
                for work in step.operations
            ]
        if checking:
            register_checkpoint_conversion_mapping(kind, mapping, overwrite=True)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]


def _checks_shape(work: Any) -> bool:
    """Whether an operation looks at the shape of the model's parameter."""
    return type(work) is Transpose and getattr(work, "check_dims", False)  # transformers 5.0 has no such check

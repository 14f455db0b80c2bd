"""What the oldest allowed versions of the libraries lack, and the tests that need it: skipped there, with the reason.

`scripts/constraints_oldest.txt` has these versions. A test that fails there for any other reason found a fault of ours.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Qwen2_5_VLForConditionalGeneration

# Frozen vision features can be handed to a model from transformers 5.18 on.
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters
TRIED_WITH = {torch: "2.15", transformers: "5.23"}
# Families whose code in older libraries fails, or computes otherwise than that of these versions.
FAMILIES = {
    torch: ("deepseek_ocr2", "ernie4_5_vl_moe", "glm4v_moe", "qwen3_5_moe", "qwen3_vl_moe"),
    transformers: (
        "exaone4_5",
        "gemma3n",
        "granite4_vision",
        "janus",
        "kimi_k25",
        "lfm2_vl",
        "qwen2_5_omni_thinker",
        "qwen3_omni_moe_thinker",
        "vipllava",
    ),
}
# By the beginning of a test's name.
KEPT_FEATURES = (
    "tests/faults/test_disk_errors.py::test_what_cannot_be_read_is_passed_over[True]",
    "tests/faults/test_waiting.py::test_machines_without_a_shared_disk_have_all_features_each",
    "tests/invariant/test_cache.py::test_every_escape_hatch_gives_the_same_losses",
    "tests/invariant/test_evaluation_cache.py::test_cached_answers_are_the_same_and_images_are_looked_at_once",
    "tests/invariant/test_full_training.py::test_projector_and_language_are_saved_together",
    "tests/invariant/test_part_lora_runs.py::test_a_projector_behind_a_tower_whose_output_is_kept",
    "tests/invariant/test_part_lora_runs.py::test_a_run_says_and_saves_what_it_trained",
    "tests/invariant/test_part_lora_runs.py::test_two_ranks_feed_the_projector_from_the_cache",
    "tests/parity/test_features.py",
    "tests/parity/test_input_path.py::test_features_are_kept_of_coded_pixels",
    "tests/parity/test_padded_rows.py::test_other_ways_to_the_same_losses[head",
    "tests/parity/test_padded_rows.py::test_other_ways_to_the_same_losses[units",
    "tests/parity/test_variants.py::test_features_of_a_tower_that_adds_none_to_deeper_layers",
    "tests/recipes/test_forecast.py::test_plan_says_what_training_does",
    "tests/unit/test_odd_modules.py::test_vision_features_of_an_unknown_family_are_checked_before_they_are_kept",
)
OTHER_MODELS = (
    "tests/parity/test_expert_targets.py::test_saved_opened_and_merged",
    "tests/parity/test_liger.py::test_a_gpu_without_liger_kernel_is_told_how_to_get_it",
    "tests/parity/test_plain.py::test_the_switch_reaches_the_kernels_of_gpus_and_run_json",
    "tests/parity/test_recurrent.py::test_a_language_model_of_mamba_2_shares",
    "tests/parity/test_recurrent.py::test_mamba_2_answers_from_the_state_behind_a_question",
    "tests/parity/test_rotary.py",
    "tests/parity/test_router_loss.py",
    "tests/parity/test_variants.py::test_a_language_model_that_takes_no_sdpa_shares_by_its_own_attention",
    "tests/parity/test_variants.py::test_a_model_without_attention_shares_and_is_verified",
    "tests/parity/test_windows.py::test_a_larger_gemma_4_shows_pictures_both_ways_in_its_windows",
    "tests/unit/test_all_types.py",
    "tests/unit/test_forecast_counts.py::test_parameters_and_operations[paligemma",
    "tests/unit/test_layout.py::test_every_family_is_refused_in_one_line_or_can_be_made_ready",
)


def lacking(test: str) -> str | None:
    """Why a test cannot pass with the installed versions.

    Args:
        test: its name, e.g. "tests/unit/test_layout.py::test_x[case]".
    """
    if not TAKES_FEATURES and test.startswith(KEPT_FEATURES):
        return "this transformers takes no kept features"
    if _is_older(transformers) and test.startswith(OTHER_MODELS):
        tried = TRIED_WITH[transformers]
        return f"transformers {transformers.__version__} has other models or computes them otherwise than {tried}"
    return None


def lacking_families() -> dict[str, str]:
    """Why families cannot be tried with the installed versions, by family."""
    return {
        name: f"tried with {library.__name__} {TRIED_WITH[library]} and newer"
        for library, names in FAMILIES.items()
        if _is_older(library)
        for name in names
    }


def _is_older(library: Any) -> bool:
    return Version(library.__version__) < Version(TRIED_WITH[library])

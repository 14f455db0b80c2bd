"""What the oldest allowed versions of the libraries lack, and the tests that need it: skipped there, with the reason.

`scripts/constraints_oldest.txt` has these versions. A test that fails there for any other reason found a fault of ours.
"""

from __future__ import annotations

import transformers
from packaging.version import Version

from tests.tiny_models import TAKES_FEATURES

# By the beginning of a test's name.
KEPT_FEATURES = (
    "tests/faults/test_disk_errors.py::test_what_cannot_be_read_is_passed_over",
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
TRIED_WITH = "5.23"  # of transformers, whose models the second list is about


def lacking(test: str) -> str | None:
    """Why a test cannot pass with the installed versions.

    Args:
        test: its name, e.g. "tests/unit/test_layout.py::test_x[case]".
    """
    if not TAKES_FEATURES and test.startswith(KEPT_FEATURES):
        return "this transformers takes no kept features"
    if Version(transformers.__version__) < Version(TRIED_WITH) and test.startswith(OTHER_MODELS):
        return f"transformers {transformers.__version__} has other models or computes them otherwise than {TRIED_WITH}"
    return None

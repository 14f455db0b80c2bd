"""Layers with sliding windows and chunks inside packs, by the table and by the check of families that are not in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.parity.test_exactness import case, check, declared
from tests.questions import PROMPT
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model import families
from vlm_sft.model.adapters import resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import CHUNKED, FULL, SLIDING, PackMode, Reach, declared_mode, sharing_mode
from vlm_sft.model.load import set_attention
from vlm_sft.model.pack_context import PackLayout, branch_mask
from vlm_sft.model.parts import PROJECTOR, VISION, saved_modules
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.vision_features import tower_modules

PACK = [Bundle(1, (2, 0)), Bundle(2, (1,)), Bundle(0, (5, 1, 2, 9))]


@pytest.mark.parametrize("kind", ["blockwise", "dense"])
def test_a_larger_gemma_4_shows_pictures_both_ways_in_its_windows(kind: families.Kind) -> None:
    tried = case("gemma4_larger", torch.float32)
    mode = declared(tried, kind)
    assert mode.image_blocks and mode.reaches == (Reach(FULL, blocks=False), Reach(SLIDING, window=24))
    check(tried, PACK, mode)


def test_a_smaller_gemma_4_does_not() -> None:
    model, _ = tiny_models.build("gemma4")
    mode = declared_mode(model.config, "blockwise")
    assert mode is not None and not mode.image_blocks
    model.config.text_config.is_causal = False
    mode = declared_mode(model.config, "blockwise")
    assert mode is not None and not mode.shares and "see each other in both directions" in mode.note


def with_window(family: str) -> Callable[[], Any]:
    """Build a family with a sliding window in all of its layers."""
    build = tiny_models.FAMILIES[family]

    def windowed() -> Any:
        model, processor = build()
        config = model.config
        config.text_config.sliding_window = 18
        return type(model)(config), processor

    return windowed


@pytest.mark.parametrize("kind", ["blockwise", "dense"])
def test_one_kind_of_layers_with_a_window(monkeypatch: pytest.MonkeyPatch, kind: families.Kind) -> None:
    monkeypatch.setitem(tiny_models.FAMILIES, "mistral3", with_window("mistral3"))
    tried = case.__wrapped__("mistral3", torch.float64)
    mode = declared(tried, kind)
    assert mode.reaches == (Reach(SLIDING, window=18),)
    check(tried, PACK, mode)
    with pytest.raises(AssertionError):
        check(tried, PACK, PackMode(kind))


def test_reaches_are_counted_in_the_separate_sequence() -> None:
    """Against each question's own sequence, written down token by token."""
    layout = PackLayout(13, [[0, 5, 9, 13]])
    for reach in (Reach(SLIDING, window=3), Reach(CHUNKED, chunk=3), Reach(CHUNKED, chunk=4), Reach()):
        (mask,) = layout.masks(torch.device("cpu"), reach)
        assert mask is not None
        for first in (5, 9):  # a question behind the prefix of five tokens
            own = [*range(5), *range(first, first + 4)]
            for i in range(9):
                for j in range(9):
                    seen = j <= i and (reach.window is None or j > i - reach.window)
                    seen = seen and (reach.chunk is None or j // reach.chunk == i // reach.chunk)
                    assert mask[0, 0, own[i], own[j]] == seen
        assert not mask[0, 0, 9:, 5:9].any()
    assert layout.masks(torch.device("cpu"), Reach(SLIDING, window=99))[0] is not None  # two questions
    single = PackLayout(9, [[0, 5, 9]])
    plain = [
        single.masks(torch.device("cpu"), reach)[0] for reach in (Reach(SLIDING, window=9), Reach(CHUNKED, chunk=9))
    ]
    assert plain == [None, None]


def test_what_masks_add_to_scores_is_made_once_a_pack() -> None:
    layout = PackLayout(13, [[0, 5, 9, 13]])
    (seen,), (added,) = (layout.masks(torch.device("cpu"), dtype=dtype) for dtype in (torch.bool, torch.float64))
    assert seen is not None and added is not None
    assert torch.equal(added, torch.where(seen, 0.0, -torch.inf).double())
    assert layout.masks(torch.device("cpu"), dtype=torch.float64)[0] is added


@pytest.mark.parametrize("family", ["cohere2_vision", "gemma4"])
def test_an_unknown_family_with_windows_is_tried(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = unknown(family, monkeypatch)
    config = model.config.text_config
    config.sliding_window = 4096  # far longer than the questions of the check
    mode = choose_mode(model, encoder)
    assert mode == sharing_mode(model.config, "blockwise") and mode.reaches[1] == Reach(SLIDING, window=4096)
    assert config.sliding_window == 4096


def unknown(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Encoder]:
    """A tiny model of a family that is not in the table, as it looks then."""
    monkeypatch.setattr(families, "FAMILIES", {})
    model, processor = tiny_models.build(family)
    set_attention(model, SHARED_SDPA)
    return model, Encoder(processor, PROMPT)


def test_a_window_that_only_the_configuration_has_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not follow its setting would be trained with windows that it does not have."""
    model, encoder = unknown("llava", monkeypatch)
    assert choose_mode(model, encoder).shares
    model.config.text_config.sliding_window = 4096
    mode = choose_mode(model, encoder)
    assert not mode.shares and "differ from separate ones" in mode.note


def test_a_window_that_is_not_followed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = unknown("cohere2_vision", monkeypatch)
    model.config.text_config.sliding_window = 4096

    def blind(branch: torch.Tensor, index: torch.Tensor, reach: Reach, blocks: torch.Tensor | None) -> torch.Tensor:
        return branch_mask(branch, index, Reach(), blocks)

    monkeypatch.setattr("vlm_sft.model.pack_context.branch_mask", blind)
    mode = choose_mode(model, encoder)
    assert not mode.shares and "differ from separate ones" in mode.note


def test_layers_of_an_unknown_kind_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = unknown("cohere2_vision", monkeypatch)
    model.config.text_config.layer_types = ["sliding_attention", "indexed_attention", "hybrid"]
    mode = declared_mode(model.config, "blockwise")
    assert mode is not None and "layers of hybrid, indexed_attention" in mode.note


def test_a_trained_tower_is_the_one_that_sees() -> None:
    model, _ = tiny_models.build("gemma3n")
    assert any(name.startswith("model.vision_tower") for name in saved_modules(model, [VISION]))
    assert not any("audio" in name for name in saved_modules(model, [VISION, PROJECTOR]))
    assert saved_modules(model, [PROJECTOR]) == ("model.embed_vision",)


def test_a_tower_beside_the_language_model() -> None:
    """Llama 4 has no inner model that holds both."""
    model, _ = tiny_models.build("llama4")
    assert set(tower_modules(model)) == {"vision_model", "multi_modal_projector"}
    assert not any("lm_head" in path for path in resolve_targets(model, ["all-linear"]).paths)
    assert saved_modules(model, [PROJECTOR]) == ("multi_modal_projector",)
    assert "vision_model" in saved_modules(model, [VISION])

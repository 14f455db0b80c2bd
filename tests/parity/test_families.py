"""The families that tile images, or keep their shape, through every stage; and the table of all families."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families as bench
from common import with_block
from tests import older_versions, tiny_models
from tests.older_versions import TAKES_FEATURES
from tests.questions import PROMPT, pack, picture, questions, tiny
from vlm_sft.common import artifacts
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import FAMILIES, PackMode, declared_mode
from vlm_sft.model.feature_precompute import tower_settings
from vlm_sft.model.load import find_base
from vlm_sft.model.vision_features import joined_tensors, unwrap
from vlm_sft.planning.run_setting import shape_of

NEWER = list(tiny_models.LATER)
# What is new in them is in another family, too.
SIMILAR = {"aya_vision", "glm4v", "glm_ocr", "qwen3_5_moe", "ernie4_5_vl_moe", "kimi_k25", "deepseek_ocr2"}
REPEATING = pytest.mark.slow
# What stands for an image in their chat templates, or before it.
SIGNS = {
    "mistral3": "[IMG]",
    "internvl": "<IMG_CONTEXT>",
    "molmo2": "<|image|>",
    "paddleocr_vl": "<|IMAGE_START|>",
    "minicpmv4_6": "<unk_image>",
    "lfm3_vl": "<|vision_start|>",
    "perception_lm": "<|image|>",
    "exaone4_5": "<|vision_start|>",
    "lighton_ocr": "<|image_pad|>",
    "video_llama_3": "<|image_pad|>",
    "hunyuan_vl": "<image_start>",
    "deepseek_vl": "<image_placeholder>",
    "deepseek_vl_hybrid": "<image_placeholder>",
    "janus": "<image_placeholder>",
    "aria": "<|img|>",
    "qwen2_5_omni_thinker": "<|vision_start|>",
    "qwen3_omni_moe_thinker": "<|vision_start|>",
    "cosmos3_edge": "<|vision_start|>",
    "cosmos3_omni": "<|vision_start|>",
    "hyperclovax_vision_v2": "<|vision_start|>",
    "step3p7": "<im_patch>",
    "minicpmv4_7": "<unk_image>",
    "minicpm_ocr": "<unk_image>",
}
SHARING = [family for family in NEWER if not FAMILIES[family].reason]


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """A run collects garbage several times: what is here before it need not be looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("family", [pytest.param(name, marks=REPEATING if name in SIMILAR else ()) for name in NEWER])
@pytest.mark.usefixtures("little_garbage")
def test_every_stage(family: str, tmp_path: Path) -> None:
    found = bench.examine(family, tmp_path)
    assert found["declared"] and (found["questions"], found["other_tokens"]) == (9, 0)
    assert found["shares"] == (not FAMILIES[family].reason) == found["train"]["shared"]
    assert not found["shares"] or found["difference"] < 2e-5
    assert found["features"] == "" or not TAKES_FEATURES
    assert (found["train"]["steps"], found["train"]["evaluated"]) == (2, 4)
    assert all(0 < loss < 20 for loss in found["train"]["losses"])
    assert found["reload"] == {"exit_code": 0, "questions": 4, "identical": 4}
    merge = found["merge"]
    assert merge["identical_answers"] == merge["questions"] == 2
    assert merge["largest_difference"] <= merge["tolerance"]


def test_the_page_names_the_families_that_older_versions_lack() -> None:
    said = bench.PAGE.read_text(encoding="utf-8").partition("Older versions:")[2].partition("##")[0]
    named = {name for name in FAMILIES if f"`{name}`" in said}
    assert named == {name for names in older_versions.FAMILIES.values() for name in names}


def test_the_page_is_made_from_the_artifact() -> None:
    result = artifacts.read_json(bench.RESULT)
    page = bench.PAGE.read_text(encoding="utf-8")
    assert with_block(page, "families", bench.table(result)) == page
    found = {entry["family"]: entry for entry in result["families"]}
    assert set(found) == {*tiny_models.FAMILIES, *tiny_models.LACKING} == set(FAMILIES)
    for name, entry in found.items():
        if "missing" not in entry:
            assert entry["other_tokens"] == 0, name
            assert entry["shares"] == (not FAMILIES[name].reason), name
            assert entry["reload"]["identical"] == entry["reload"]["questions"] == 4, name
            assert entry["merge"]["identical_answers"] == entry["merge"]["questions"] == 2, name


def test_what_does_not_work_is_told() -> None:
    lacking = {"family": "later", "missing": "transformers 5.0 lacks it"}
    assert bench.row(lacking).startswith("| `later` | transformers 5.0 lacks it |")
    found = {
        "family": "odd",
        "questions": 9,
        "other_tokens": 2,
        "shares": False,
        "note": "odd: no",
        "features": "why",
        "trimmed": False,
        "train": {"exit_code": 2},
    }
    assert bench.row(found) == (
        "| `odd` | 7 of 9 | no, see below | no (exit code 2) | not reached | not reached | no: why | no |"
    )
    entries = [{**found, "targets": ["q_proj"], "sized": True}, {**found, "targets": ["wq"], "sized": False}, lacking]
    assert bench.notes(entries)[2:] == [
        "By default, LoRA goes to `wq` in `odd`.",
        "The forecast knows the sizes of `odd`. Elsewhere it counts them on the model itself, more roughly.",
    ]


def two_pictures(family: str) -> tuple[Any, Any]:
    """A model and the encoded questions of two images each, with a word before every image."""
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    sign = SIGNS.get(family, "<image>")
    encoder.processor.chat_template = encoder.processor.chat_template.replace(sign, f"See: {sign}")
    groups = []
    for seed, size in enumerate(((72, 56), (150, 60))):
        # transformers' PerceptionLM takes pictures together only where they are cut into as many tiles.
        images = (picture(seed, size), picture(seed + 10, size if family == "perception_lm" else (56, 90)))
        groups.append(encoder.encode([replace(sample, images=images) for sample in questions(seed, 3, size)]))
    return model.eval(), groups


def logits(model: Any, bundles: list[Bundle], groups: Any, mode: PackMode) -> torch.Tensor:
    batch = pack(bundles, groups)
    with torch.no_grad(), packed_forward.packed(batch, mode, 0):
        return packed_forward.forward(model, batch, mode).logits[0]


@pytest.mark.parametrize("family", SHARING)
def test_questions_about_two_pictures_share_them(family: str) -> None:
    model, groups = two_pictures(family)
    mode = declared_mode(model.get_base_model().config, "blockwise")
    assert mode is not None
    order = [Bundle(1, (2, 0)), Bundle(0, (0, 1, 2))]
    alone = [Bundle(bundle.group, (number,)) for bundle in order for number in bundle.questions]
    expected = torch.cat([logits(model, [bundle], groups, PackMode("separate")) for bundle in alone])
    limit = 1e-5 * expected.std()
    assert (logits(model, order, groups, mode) - expected).abs().max() <= 10 * limit
    if mode.one_block:  # its pictures see each other across the words between them
        assert (logits(model, order, groups, replace(mode, one_block=False)) - expected).abs().max() > 1000 * limit


@pytest.mark.parametrize("family", NEWER)
def test_pictures_of_any_shape_are_the_processors(family: str) -> None:
    """After the first picture the image processor alone may seem to be enough, and not be for other shapes."""
    _, processor = tiny_models.build(family)
    encoder = Encoder(processor, PROMPT)
    for seed, size in enumerate(((56, 56), (200, 60), (60, 150), (100, 60))):
        (sample,) = questions(seed, 1, size)
        image = decode_rgb(sample.images[0].load(), "")
        whole = processor(text=[encoder.prompt_text(sample)], images=[[image]], return_tensors="pt")
        for name, value in encoder.process_images(sample).items():
            assert torch.equal(value, whole[name]), (size, name)


def test_images_of_different_shapes_are_padded_where_they_are_joined() -> None:
    tiles = [torch.ones(1, count, 3, 4, 4) for count in (2, 5)]
    sizes = torch.ones(1, 2)
    joined = joined_tensors([{"pixel_values": part, "image_sizes": sizes} for part in tiles])["pixel_values"]
    assert joined.shape == (2, 5, 3, 4, 4)
    assert joined[0, 2:].abs().sum() == 0 and joined[0, :2].min() == joined[1].min() == 1
    some = joined_tensors(
        [{"counts": torch.tensor([0])}, {"counts": torch.tensor([1]), "crops": torch.ones(1, 3, 4, 4)}]
    )
    assert some["counts"].tolist() == [0, 1] and some["crops"].shape == (1, 3, 4, 4)
    places = [torch.tensor([[0, 1], [3, -1]]), torch.tensor([[0, -1]])]
    crops = [torch.zeros(2, 9, 8), torch.zeros(1, 9, 8)]
    images = [{"pixel_values": a, "image_token_pooling": b} for a, b in zip(crops, places, strict=True)]
    assert joined_tensors(images)["image_token_pooling"].tolist() == [[0, 1], [3, -1], [18, -1]]


def joined_shape(*images: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the joined pixels of images that a processor gave tensors of these shapes."""
    made = [{name: torch.ones(shape) for name, shape in image.items()} for image in images]
    return tuple(joined_tensors(made)["pixel_values"].shape)


def test_tiles_are_padded_only_where_the_model_is_told_how_many_there_are() -> None:
    two, five = {"pixel_values": (1, 2, 3, 8, 8)}, {"pixel_values": (1, 5, 3, 8, 8)}
    assert joined_shape(two, five) == (1, 7, 3, 8, 8)  # PerceptionLM
    assert joined_shape({"pixel_values": (2, 3, 3, 8, 8)}, five) == (1, 11, 3, 8, 8)  # two pictures of one question
    sized = {"image_sizes": (1, 2)}  # LLaVA-NeXT
    assert joined_shape(two | sized, five | sized) == (2, 5, 3, 8, 8)
    tiles = [image | {"pixel_attention_mask": (1, count)} for image, count in ((two, 2), (five, 5))]  # Granite Docling
    assert joined_shape(*tiles) == (2, 5, 3, 8, 8)
    pixels = [image | {"pixel_attention_mask": (1, count, 8, 8)} for image, count in ((two, 2), (five, 5))]  # Idefics
    assert joined_shape(*pixels) == (1, 7, 3, 8, 8)
    patches = [{"pixel_values": (1, 3, 14, 14 * count), "target_sizes": (1, 2)} for count in (4, 6)]  # MiniCPM-V
    assert joined_shape(*patches) == (1, 3, 14, 140)


@pytest.mark.parametrize("family", ["minicpmv4_6", "granite4_vision"])
def test_the_head_scores_the_needed_rows_only(family: str) -> None:
    """One class of the two has no argument for it, the other divides its scores behind the head."""
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    group = encoder.encode(questions(0, 2))
    batch = pack([Bundle(0, (1,))], [group])
    scored: list[int] = []
    head = unwrap(model).get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: scored.append(output.shape[1]))
    expected = model(**packed_forward.separate_inputs(model, batch)).logits[0, batch.predict]
    mode = declared_mode(unwrap(model).config, "dense")
    assert mode is not None
    for way in (PackMode("separate"), mode):
        torch.testing.assert_close(logits(model, [Bundle(0, (1,))], [group], way), expected, rtol=1e-4, atol=1e-5)
    assert scored == [batch.tokens, len(batch.predict), len(batch.predict)]


def test_features_depend_on_weights_of_no_module() -> None:
    model, _ = tiny("llava_onevision", torch.float32, SHARED_SDPA)
    before = tower_settings(model)
    with torch.no_grad():
        unwrap(model).model.image_newline[0] += 1
    assert tower_settings(model)["tower"] != before["tower"]


@pytest.mark.parametrize("family", NEWER)
def test_the_forecast_counts_their_parameters(family: str, tmp_path: Path) -> None:
    base = find_base(str(tiny_models.save(family, tmp_path)), bf16=False)
    model, _ = tiny_models.build(family)
    assert shape_of(base).parameters == sum(parameter.numel() for parameter in model.parameters())

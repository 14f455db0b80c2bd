"""The architecture of pocket, its training pass against the stock model, its training loop, and the shipped folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("tools.pocket.forward", reason="pocket is trained with newer transformers", exc_type=ImportError)

from tools.pocket import build, curriculum, score, train
from tools.pocket.batches import build_batch
from tools.pocket.canvas import CHARACTER_CLASSES, THING_CLASSES
from tools.pocket.card import CARD, SCORES, card
from tools.pocket.forward import (
    LOOKING,
    SLOTS,
    SPELLING_WEIGHT,
    SlotHead,
    answer_logits,
    batch_loss,
    looking_loss,
    vision_features,
)
from tools.pocket.labels import COLOUR_FACT, FACT_CLASSES, FACTS, RANK_FACTS, SPELLING_FACTS, UNKNOWN
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.model.pocket import WEIGHTS

MAX_PARAMETERS = 12_000_000
MAX_SHIPPED_BYTES = 24_000_000
TOLERANCE = 5e-5  # of float32: 1.4e-5 was met on an Intel Cascade Lake


@pytest.fixture(scope="module")
def model() -> Any:
    return build.build_model(seed=1).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return build.build_processor()


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return score.load(WEIGHTS)


def test_the_architecture_is_the_stock_one_and_small(model: Any) -> None:
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 2_000_000 < sum(weight.numel() for weight in model.parameters()) <= MAX_PARAMETERS
    text = model.config.text_config
    assert sum(text.rope_parameters["mrope_section"]) * 2 == text.hidden_size // text.num_attention_heads
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_equal_seeds_build_equal_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = build.build_model(3), build.build_model(3), build.build_model(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [one.model.visual.patch_embed.proj.weight for one in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (8, 8)), ((192, 128), (16, 24)), ((256, 192), (24, 32)), ((33, 47), (6, 4))]
)
def test_the_processor_takes_pictures_as_they_are(processor: Any, size: tuple[int, int], grid: tuple[int, int]) -> None:
    found = processor.image_processor(images=[Image.new("RGB", size, "white")], return_tensors="pt")
    assert tuple(found["image_grid_thw"][0].tolist()) == (1, *grid)
    assert found["pixel_values"].abs().max() == 0, "white paper is zero"


def test_a_picture_of_64_px_is_16_visual_tokens_in_the_prompt(processor: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Which shape?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(text=[text], images=[Image.new("RGB", (64, 64))], return_tensors="pt")["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 16
    assert text.endswith("Which shape?<|im_end|>\n<|im_start|>assistant\n") and text.startswith(
        "<|im_start|>user\n<|vision_start|>"
    )


def test_large_pictures_are_reduced_to_the_limit(processor: Any) -> None:
    grid = processor.image_processor(images=[Image.new("RGB", (1024, 512))], return_tensors="pt")["image_grid_thw"][0]
    assert grid.prod() * build.PATCH_PX**2 <= build.MAX_PIXELS


@pytest.mark.parametrize("lesson", ["sign", "shapes"])
def test_the_training_pass_sees_what_the_processor_and_the_stock_tower_see(
    model: Any, processor: Any, lesson: str
) -> None:
    pictures = curriculum.held_out_pictures(lesson, 4)[:4]
    batch = build_batch(pictures, processor.tokenizer)
    stock = processor.image_processor(images=[Image.fromarray(one.pixels) for one in pictures], return_tensors="pt")
    torch.testing.assert_close(batch["patches"].reshape(-1, stock["pixel_values"].shape[1]), stock["pixel_values"])
    with torch.no_grad():
        mine = vision_features(model.model.visual, batch["patches"], batch["grid"])
        theirs = model.model.visual(stock["pixel_values"], stock["image_grid_thw"]).pooler_output
    torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=TOLERANCE, atol=TOLERANCE)


def _stock_losses(model: Any, processor: Any, picture: Any) -> list[torch.Tensor]:
    """Summed loss of every question alone, through the processor and the stock model's own loss."""
    losses = []
    for question, answer in picture.questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        answered = len(processor.tokenizer(f"{answer}<|im_end|>").input_ids)
        inputs = processor(
            text=[f"{text}{answer}<|im_end|>"], images=[Image.fromarray(picture.pixels)], return_tensors="pt"
        )
        labels = inputs["input_ids"].clone()
        labels[:, :-answered] = -100
        with torch.no_grad():
            losses.append(model(**inputs, labels=labels).loss * answered)
    return losses


def test_questions_that_share_a_picture_lose_what_they_lose_alone(model: Any, processor: Any) -> None:
    pictures = curriculum.held_out_pictures("sign", 3)[:3]
    assert len({len(one.questions) for one in pictures} | {sum(map(len, one.questions[0])) for one in pictures}) > 1
    batch = build_batch(pictures, processor.tokenizer)
    with torch.no_grad():
        features = vision_features(model.model.visual, batch["patches"], batch["grid"])
        logits = answer_logits(model, features, batch)[0]
        together = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
    for row, picture in enumerate(pictures):
        alone = torch.stack(_stock_losses(model, processor, picture)).sum()
        torch.testing.assert_close(together[batch["picked"][:, 0] == row].sum(), alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_question_does_not_see_the_question_before_it(model: Any, processor: Any) -> None:
    picture = curriculum.held_out_pictures("sign", 1)[0]
    swapped = [(("Read it?", "zz"), *picture.questions[1:]), picture.questions]
    last = []
    for questions in swapped:
        batch = build_batch([type(picture)("sign", picture.pixels, tuple(questions), None)], processor.tokenizer)
        with torch.no_grad():
            features = vision_features(model.model.visual, batch["patches"], batch["grid"])
            last.append(answer_logits(model, features, batch)[0][-1])
    torch.testing.assert_close(last[0], last[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_slot_head_counts_what_is_there_and_not_the_empty_slots() -> None:
    head = SlotHead(4)
    with torch.no_grad():
        for one, classes in ((head.characters, CHARACTER_CLASSES), (head.things, THING_CLASSES)):
            one.weight.zero_()
            one.bias.zero_()
            one.bias.view(SLOTS, classes)[:, 7] = 9.0
    slots = torch.zeros(2, 1, 2, SLOTS, dtype=torch.long)
    slots[0, 0, 0, :3], slots[0, 0, 1, 0], slots[1, 0, 0, 0] = 7, 8, 7
    loss, right = head(torch.zeros(1, 2, 4), slots)
    assert right == {"characters": pytest.approx(0.75), "things": 1.0}
    assert loss > 1


def test_the_facts_about_labels_are_learned_where_there_are_labels_only() -> None:
    head = SlotHead(4)
    with torch.no_grad():
        head.facts.weight.zero_()
        head.facts.bias.zero_()
        head.facts.bias.view(-1, FACT_CLASSES)[[0, COLOUR_FACT, RANK_FACTS], 3] = 2.0
    facts = torch.full((FACTS, 1, 3), UNKNOWN)
    facts[0, 0, 0], facts[1, 0, 2], facts[COLOUR_FACT, 0, 0], facts[RANK_FACTS, 0, 2] = 3, 5, 3, 4
    facts[SPELLING_FACTS, 0, 0], facts[SPELLING_FACTS + 1, 0, 2] = 0, 6
    features = torch.randn(1, 3, 4, requires_grad=True)
    loss, right = head.fact_loss(features, facts)
    everything = math.exp(2) + FACT_CLASSES - 1
    likely, unlikely, even = math.exp(2) / everything, 1 / everything, 1 / FACT_CLASSES
    others, spelling = -sum(map(math.log, (likely, even, likely, unlikely))) / 4, -math.log(even)
    assert loss.item() == pytest.approx(others + SPELLING_WEIGHT * spelling)
    assert right == {"values": 0.5, "colours": 1.0, "ranks": 0.0, "spelling": 0.5}
    with torch.no_grad():
        head.facts.weight.normal_()
    head.fact_loss(features, facts)[0].backward()
    assert features.grad is not None and features.grad[0, 1].abs().max() == 0 < features.grad[0, 0].abs().max()


def test_the_share_of_attention_that_is_rewarded_is_that_of_the_stock_layer(model: Any, processor: Any) -> None:
    pictures = curriculum.held_out_pictures("tiny chart", 20)
    picture = next(one for one in pictures if one.sought is not None and one.sought.any((1, 2, 3)).all())
    batch = build_batch([picture], processor.tokenizer)
    hidden_size = model.config.text_config.hidden_size
    features = torch.randn(1, batch["patches"].shape[1] // 4, hidden_size)
    with torch.no_grad():
        loss, share = looking_loss(model, answer_logits(model, features, batch)[1], batch)
    rows = []
    for number, (question, answer) in enumerate(picture.questions):
        alone = build_batch([type(picture)("chart", picture.pixels, ((question, answer),), None)], processor.tokenizer)
        embedded = model.get_input_embeddings()(alone["input_ids"])
        image = alone["input_ids"][0] == model.config.image_token_id
        embedded[0, image] = features[0]
        with torch.no_grad():
            model.set_attn_implementation("eager")
            weights = model.model.language_model(
                inputs_embeds=embedded, position_ids=alone["position_ids"], output_attentions=True, use_cache=False
            ).attentions
            model.set_attn_implementation("sdpa")
        for (layer, head), sought in zip(LOOKING, picture.sought[:, number], strict=True):
            if sought.any():
                seen = weights[layer][0, head][alone["picked"][:, 1]][:, image]
                rows.append(seen[:, torch.from_numpy(sought).flatten()].sum(-1))
    theirs = torch.cat(rows)
    assert share == pytest.approx(theirs.mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(-theirs.log().mean().item(), rel=1e-4)


def test_the_first_heads_begin_at_their_neighbours(model: Any) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    tower, rows, columns = model.model.visual, 9, 9
    spots = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    cos, sin = tower.rotary_pos_emb(torch.zeros(1), spots)
    heads = model.config.vision_config.num_heads
    biases = tower.blocks[0].attn.qkv.bias.detach().view(3, heads, -1)
    query, key = apply_rotary_pos_emb_vision(*(one.expand(rows * columns, heads, -1) for one in biases[:2]), cos, sin)
    middle = 4 * columns + 4
    for head, (down, right) in enumerate(build.PATCH_OFFSETS[0]):
        best = int((query[middle, head] @ key[:, head].T).argmax())
        assert (best // columns - 4, best % columns - 4) == (down, right)


def test_learning_rate_rises_stays_and_falls() -> None:
    rates = [train.learning_rate(step, 1000) for step in (0, 200, 699, 850, 999)]
    assert rates[0] < rates[1] == rates[2] == train.PEAK_LEARNING_RATE > rates[3] > rates[4] > 0
    assert train.learning_rate(10**6, 0) == train.LATER_LEARNING_RATE < train.PEAK_LEARNING_RATE


def _trained(folder: Path, *legs: int) -> train.Run:
    """A run of `legs` steps, stopped and resumed between them; the plan is the last of them from the start."""
    run = train.Run(folder, seed=7)
    for leg, steps in enumerate(legs):
        if leg:
            run = train.Run.resume(folder)
        train.train(run, steps, 0.0, threads=1)
    return run


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "DECLINE", 1e-9)  # the plan grows from 2 to 3 here, which only an undeclined run may do
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = _trained(tmp_path / "whole", 3), _trained(tmp_path / "parts", 2, 3)
    assert (whole.step, whole.pictures) == (parts.step, parts.pictures) and whole.pictures > 10
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_exported_folder_is_continued_with_its_weights_heads_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"steps": 5000, "minutes": 2.5, "pictures": 70, "questions": 300, "threads": 2, "seed": 7}
    first = train.Run(tmp_path, seed=7)
    build.save_folder(first.average, tmp_path / "shipped", first.head)
    artifacts.write_json(tmp_path / "shipped" / SCORES, {"training": counts})
    out = tmp_path / "out"
    assert train.main(["--output_dir", str(out), "--continue_from", str(tmp_path / "shipped"), "--steps", "5000"]) == 0
    run = train.Run.resume(out)
    assert (run.step, run.seed, run.pictures, run.questions, run.threads) == (5000, 7, 70, 300, 2)
    for mine, theirs in ((run.model, first.average), (run.average, first.average), (run.head, first.head)):
        for weight, shipped in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(weight, shipped.bfloat16().float())
    rates = [train.learning_rate(step, 0, run.first) for step in (5000, 5025, 5049, 9000)]
    assert rates[0] < rates[1] < rates[2] == rates[3] == train.LATER_LEARNING_RATE
    (tmp_path / "shipped" / build.TRAINING_HEADS).unlink()
    command = ["--output_dir", str(tmp_path / "new"), "--continue_from", str(tmp_path / "shipped"), "--steps", "6000"]
    assert train.main(command) == RunError.exit_code
    assert "cannot be continued" in capsys.readouterr().err


def test_the_shipped_weights_are_continued_with_their_heads(tmp_path: Path) -> None:
    run = train.Run.continue_from(tmp_path, WEIGHTS)
    assert run.step == run.first == artifacts.read_json(WEIGHTS / SCORES)["training"]["steps"]
    heads = load_file(build.SHIPPED_HEADS)
    assert heads and all(torch.equal(run.head.state_dict()[name], weight.float()) for name, weight in heads.items())


def test_a_step_lowers_the_loss_of_its_own_batch(processor: Any) -> None:
    run = train.Run(Path("."), seed=2)
    batch = build_batch(curriculum.held_out_pictures("line", 6)[:6], processor.tokenizer)
    losses = []
    for _ in range(4):
        loss, log = batch_loss(run.model, run.head, batch, 0.5)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(log["answer"])
    assert losses[-1] < losses[0] - 0.1


def test_mistakes_on_the_command_line_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--output_dir", str(tmp_path), "--resume", "--steps", "1"]) == RunError.exit_code
    assert f"{train.CHECKPOINT} does not exist" in capsys.readouterr().err
    (tmp_path / train.CHECKPOINT).write_bytes(b"not a checkpoint")
    assert train.main(["--output_dir", str(tmp_path), "--steps", "1"]) == RunError.exit_code
    assert "holds another run" in capsys.readouterr().err
    assert train.main(["--output_dir", str(tmp_path), "--resume", "--steps", "1"]) == RunError.exit_code
    assert "is damaged" in capsys.readouterr().err
    command = ["--output_dir", str(tmp_path / "old"), "--continue_from", str(WEIGHTS), "--steps", "2"]
    assert train.main(command) == RunError.exit_code
    assert "are done" in capsys.readouterr().err
    assert train.main(["--output_dir", str(tmp_path / "new")]) == RunError.exit_code
    assert "nothing to do" in capsys.readouterr().err
    assert train.main(["--output_dir", str(tmp_path / "new"), "--steps", "1", "--seed", "-1"]) == RunError.exit_code
    assert "out of range" in capsys.readouterr().err


def test_the_shipped_folder_is_whole_and_small() -> None:
    files = {path.name for path in WEIGHTS.iterdir()}
    assert files >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "generation_config.json",
        artifacts.PROMPT,
        SCORES,
        CARD,
    }
    assert build.heads_file(WEIGHTS).is_file() and build.TRAINING_HEADS not in files
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= MAX_SHIPPED_BYTES
    prompt = artifacts.read_json(WEIGHTS / artifacts.PROMPT)
    assert prompt == {
        "schema": 1,
        "template": "{question}",
        "system": "",
        "min_pixels": None,
        "max_pixels": build.MAX_PIXELS,
        "max_new_tokens": build.MAX_NEW_TOKENS,
    }


def test_the_shipped_model_is_the_architecture_in_bfloat16(shipped: tuple[Any, Any], model: Any) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert {name: weight.shape for name, weight in loaded.named_parameters()} == {
        name: weight.shape for name, weight in model.named_parameters()
    }
    generation, tokenizer = loaded.generation_config, AutoProcessor.from_pretrained(WEIGHTS).tokenizer
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.pad_token_id
    assert tokenizer.get_vocab() == build.build_processor().tokenizer.get_vocab()


def test_the_card_says_what_the_scores_say() -> None:
    record = artifacts.read_json(WEIGHTS / SCORES)
    assert (WEIGHTS / CARD).read_text(encoding="utf-8") == card(record)
    assert {"numbers", "words", "shapes", "chart", "demo_charts", "demo_text"} <= set(record["scores"])
    assert record["scores"]["demo_charts"]["n"] >= 200
    assert record["model"]["weights_bytes"] == (WEIGHTS / "model.safetensors").stat().st_size


def test_the_shipped_weights_answer_better_than_chance(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    items = [item for item in score.lesson_items("line", 120) if item.group == "numbers"]
    items += score.lesson_items("shapes", 100)
    found = score.accuracies(model, processor, items)
    assert found["numbers"]["n"] >= 25
    assert found["numbers"]["accuracy"] > 0.25, "guessing a number is right less than one time in twenty"
    assert found["shapes"]["accuracy"] > 0.6, "the most common answer to each question is right 0.45 of the time"

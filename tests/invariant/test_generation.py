"""Shared-prefix generation gives the tokens of plain generation, for any packs and any number of ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pictures import png
from tests.processes import MAIN, Warm
from tests.text_rows import text_row
from tests.tiny_models import build, save
from vlm_sft.common.errors import ModelError
from vlm_sft.data.collate import collate
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.evaluate import generate_rows
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.evaluate.batching import image_counter, plan_packs
from vlm_sft.evaluate.generate import generate
from vlm_sft.evaluate.generate_rows import rows_agree
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import Base, find_base, load_model, set_attention
from vlm_sft.model.sharing_check import choose_mode

TOKENS = 6
QUESTIONS = ("What?", "How many bars are there?", "Which colour is it, and why?")
COLOURS = ("red", "navy", "gold", "white", "black")
SIZES = ((84, 56), (56, 112), (98, 70))


def samples() -> list[Sample]:
    """Three images with one, two and three questions."""
    made = []
    for index, (width, height) in enumerate(SIZES):
        data = png(COLOURS[index], (width, height))
        image = ImageRef(ImageRef.from_bytes(data, "test").key, "test", lambda data=data: data, width, height)
        for number in range(index + 1):
            text = QUESTIONS[number]
            made.append(Sample(f"t/{index}/{number}", "t", "", (image,), text, "x", ("x",)))
    return made


def tiny_base(family: str) -> tuple[Base, Any]:
    if family == "pocket":
        base = find_base("pocket")
        return base, load_model(base).eval()
    model, processor = build(family)
    set_attention(model, SHARED_SDPA)
    prompt = PromptSettings("{question}")
    stops = (processor.tokenizer.eos_token_id,)
    return Base(family, family, processor, prompt, stops, SHARED_SDPA, torch.float32, ()), model


def plain_answer(base: Base, model: Any, encoder: Encoder, sample: Sample) -> list[int]:
    """transformers' own generation, one question at a time, nothing shared."""
    pictures = [decode_rgb(image.load(), image.source) for image in sample.images]
    inputs = base.processor(text=[encoder.prompt_text(sample)], images=[pictures], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(encoder.stop_ids), pad_token_id=0
        )
    answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
    stops = [index for index, token in enumerate(answer) if token in encoder.stop_ids]
    return answer[: stops[0]] if stops else answer


def packed_tokens(backend: SharedPrefixBackend, budget: int) -> dict[str, list[int]]:
    """Tokens by sample id under one token budget."""
    found: dict[str, list[int]] = {}
    packs = plan_packs(samples(), image_counter(backend.encoder.processor), budget, backend.separate)
    for pack in packs:
        groups = [backend.encoder.encode(members, with_answers=False) for members in pack]
        tokens, _ = backend._tokens(groups, torch.device("cpu"), TOKENS)
        found |= dict(zip([sample.id for members in pack for sample in members], tokens, strict=True))
    return found


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "smolvlm", "pocket", "paligemma"])
def test_tokens_are_those_of_plain_generation_for_any_budget(family: str) -> None:
    base, model = tiny_base(family)
    encoder = Encoder(base.processor, base.prompt, base.stop_ids)
    set_attention(model, "sdpa")
    plain = {sample.id: plain_answer(base, model, encoder, sample) for sample in samples()}
    set_attention(model, SHARED_SDPA)
    backend = SharedPrefixBackend(base, model)
    assert backend.mode.shares == (family != "paligemma")
    assert any(plain.values())
    for budget in (1, 150, 100_000):
        assert packed_tokens(backend, budget) == plain, budget


def test_a_near_tie_is_reported_and_decided_alone() -> None:
    base, model = tiny_base("qwen2_5_vl")
    backend = SharedPrefixBackend(base, model)
    group = backend.encoder.encode(samples()[3:], with_answers=False)
    batch = collate([Bundle(0, (0, 1, 2))], [group])
    settings: dict[str, Any] = {
        "mode": choose_mode(model, backend.encoder),
        "max_new_tokens": TOKENS,
        "stop_ids": backend.encoder.stop_ids,
    }
    assert generate(model, batch, **settings, near_tie=0.0).near_ties == []
    everything = generate(model, batch, **settings, near_tie=1e9)
    assert everything.near_ties == [0, 1, 2]
    alone = [generate(model, collate([Bundle(0, (number,))], [group]), **settings).tokens[0] for number in range(3)]
    assert everything.tokens == alone


@pytest.mark.parametrize("family", ["paligemma", "llava", "qwen3_5"])
def test_separate_questions_are_answered_together_where_that_is_exact(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = tiny_base(family)
    backend = SharedPrefixBackend(base, model.eval(), PackMode("separate"))
    groups = [backend.encoder.encode(samples()[3:], with_answers=False)]
    calls = []
    forward = packed_forward.separate_inputs

    def counted(*arguments: Any) -> Any:
        inputs = forward(*arguments)
        calls.append(len(inputs["input_ids"]))
        return inputs

    assert backend._in_batches and rows_agree(model, backend.encoder)
    monkeypatch.setattr(packed_forward, "separate_inputs", counted)
    together, _ = backend._tokens(groups, torch.device("cpu"), TOKENS)
    assert calls[0] == 3
    monkeypatch.setattr(generate_rows, "difference", lambda *_: 1.0)
    assert not rows_agree(model, backend.encoder)
    backend._in_batches = False
    calls.clear()
    assert backend._tokens(groups, torch.device("cpu"), TOKENS)[0] == together
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("before", [0, 2])
def test_a_text_row_is_answered_the_same_after_an_image(before: int) -> None:
    base, model = tiny_base("qwen2_5_vl")
    encoder = Encoder(base.processor, base.prompt, base.stop_ids)
    images = encoder.encode(samples()[3:], with_answers=False)
    text = encoder.encode([text_row("how many red bars?", "12")], with_answers=False)
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "stop_ids": ()}

    def answer() -> list[int]:
        return generate(model, collate([Bundle(0, (0,))], [text]), mode=PackMode("separate"), **settings).tokens[0]

    expected = answer()
    earlier = collate([Bundle(0, tuple(range(before + 1)))], [images])
    generate_rows.generate_rows(model, earlier, **settings)
    assert packed_forward.unwrap(model).model.rope_deltas.abs().min() > 0
    assert answer() == expected


def test_separate_answers_of_a_model_without_attention_end_in_one_error() -> None:
    base, model = tiny_base("qwen3_5")
    text = model.config.get_text_config()
    text.layer_types = ["linear_attention"] * text.num_hidden_layers
    with pytest.raises(ModelError, match="without attention layers"):
        SharedPrefixBackend(base, model, PackMode("separate"))
    assert not SharedPrefixBackend(base, model, PackMode()).separate


def test_near_ties_and_limits_of_a_batch() -> None:
    base, model = tiny_base("paligemma")
    encoder = Encoder(base.processor, base.prompt, base.stop_ids)
    batch = collate([Bundle(0, (0, 1, 2))], [encoder.encode(samples()[3:], with_answers=False)])
    model.generation_config.repetition_penalty = 9.0  # of the base's own; plain greedy decoding is asked for
    whole = generate_rows.generate_rows(model, batch, max_new_tokens=TOKENS, stop_ids=(), near_tie=1e9)
    assert whole.near_ties == whole.cut == [0, 1, 2] and model.generation_config.repetition_penalty == 9.0
    stop = whole.tokens[1][2]
    found = generate_rows.generate_rows(model, batch, max_new_tokens=TOKENS, stop_ids=(stop,))
    ends = [tokens.index(stop) if stop in tokens else len(tokens) for tokens in whole.tokens]
    assert found.tokens == [tokens[:end] for tokens, end in zip(whole.tokens, ends, strict=True)]
    assert found.cut == [number for number, end in enumerate(ends) if end == TOKENS] and found.near_ties == []


def test_a_rank_that_is_done_keeps_step_without_changing_its_answers() -> None:
    base, model = tiny_base("qwen2_5_vl")
    backend = SharedPrefixBackend(base, model)
    group = backend.encoder.encode(samples()[1:3], with_answers=False)
    batch = collate([Bundle(0, (0, 1))], [group])
    first = generate(model, batch, mode=backend.mode, max_new_tokens=TOKENS, stop_ids=backend.encoder.stop_ids)
    stop = first.tokens[0][0]  # this question ends at once, the other goes on
    settings: dict[str, Any] = {"mode": backend.mode, "max_new_tokens": TOKENS, "stop_ids": (stop,)}
    steps = []
    kept_busy = generate(model, batch, **settings, any_rank_busy=lambda busy: steps.append(busy) or True)
    assert len(steps) == TOKENS - 1
    assert kept_busy.tokens == generate(model, batch, **settings).tokens


def test_plan_covers_every_question_once_and_keeps_the_budget() -> None:
    from vlm_sft.evaluate.batching import rounds, share

    asked = samples()
    for budget, separate in ((1, False), (60, False), (120, True), (120, False), (10_000, True), (10_000, False)):
        packs = plan_packs(asked, lambda image: 20, budget, separate)
        ids = [sample.id for pack in packs for members in pack for sample in members]
        assert sorted(ids) == sorted(sample.id for sample in asked)
        assert all(len({sample.image_key for sample in members}) == 1 for pack in packs for members in pack)
        parts = [share(packs, (), rank, 2) for rank in range(2)]
        assert sum(map(len, parts)) == len(packs)
        assert rounds(packs, (), 2) == max(map(len, parts))
        torn = {ids[0]}
        whole = {sample.id for members in packs[0] for sample in members}
        again = share(packs, torn, 0, 1)
        assert (packs[0] in again) == (whole != torn)
    assert len(plan_packs(asked, lambda image: 20, 1)) == len(asked)
    assert len(plan_packs(asked, lambda image: 20, 10_000)) == 1


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a tiny model and own data, and the command line that evaluates it."""
    folder = tmp_path_factory.mktemp("generation")
    save("qwen2_5_vl", folder / "model")
    rows = []
    for index in range(5):
        (folder / f"{index}.png").write_bytes(png(COLOURS[index], (56 + 14 * index, 70)))
        rows += [{"image": f"{index}.png", "question": text, "answer": "x"} for text in QUESTIONS]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "eval",
        "--base_model",
        str(folder / "model"),
        "--benchmark",
        str(folder / "own.jsonl"),
        "--split",
        "train",
        "--max_new_tokens",
        str(TOKENS),
    ]
    return folder, arguments


def evaluate(warm: Warm, arguments: list[str]) -> None:
    done = warm.run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "own" / "predictions.jsonl").read_text().splitlines()]


def test_one_and_two_ranks_and_any_budget_write_the_same_predictions(
    evaluation: tuple[Path, list[str]], warm: Warm
) -> None:
    folder, arguments = evaluation
    evaluate(warm, [*arguments, "--output_dir", str(folder / "one")])
    line = [*arguments, "--output_dir", str(folder / "two"), "--tokens_per_pack", "150"]
    assert warm.start_both(line, folder / "log", script=MAIN).wait(200) == 0, (folder / "log").read_text()[-3000:]
    one = predictions(folder / "one")
    assert len(one) == 9  # of five images one is held out for validation and one for the test
    assert len({row["prediction"] for row in one}) > 3, "answers must differ, or equality would show nothing"
    assert predictions(folder / "two") == one


def kill_after_lines(warm: Warm, arguments: list[str], part: Path, count: int) -> None:
    """Start an evaluation and kill it once it has written so many predictions."""
    run = warm.start(arguments, part.parents[1].with_suffix(".log"), script=MAIN)
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up and run.wait(0.005) is None:
        if part.is_file() and part.read_bytes().count(b"\n") >= count:
            break
    run.kill()
    run.wait(30)
    assert part.is_file(), "killed before it wrote, or after it had finished"


def test_a_killed_evaluation_of_more_ranks_is_continued(evaluation: tuple[Path, list[str]], warm: Warm) -> None:
    folder, arguments = evaluation
    slow = [*arguments[:-1], "60", "--tokens_per_pack", "1"]  # one question a pack
    torn = folder / "torn" / "own"
    kill_after_lines(warm, [*slow, "--output_dir", str(folder / "torn")], torn / "predictions.rank0.jsonl", 3)
    lines = (torn / "predictions.rank0.jsonl").read_text().splitlines()
    assert 3 <= len(lines) < 9
    marked = [json.dumps(json.loads(line) | {"prediction": "kept"}) + "\n" for line in lines[:3]]
    (torn / "predictions.rank3.jsonl").write_text("".join(marked[:2]))
    (torn / "predictions.rank0.jsonl").write_text(marked[2][:40])
    evaluate(warm, [*slow, "--output_dir", str(folder / "torn")])
    evaluate(warm, [*slow, "--output_dir", str(folder / "whole")])
    continued, whole = predictions(folder / "torn"), predictions(folder / "whole")
    kept = [number for number, row in enumerate(continued) if row["prediction"] == "kept"]
    assert len(kept) == 2, "what another rank had written is kept, the torn line is asked again"
    assert len(continued) == len(whole) == 9
    assert all(continued[number] == whole[number] for number in range(len(whole)) if number not in kept)
    assert sorted(path.name for path in torn.iterdir()) == ["identity.json", "predictions.jsonl", "results.json"]


def test_predictions_of_another_prompt_are_not_continued(evaluation: tuple[Path, list[str]], warm: Warm) -> None:
    folder, arguments = evaluation
    mine = [*arguments, "--output_dir", str(folder / "mine")]
    evaluate(warm, mine)
    done = warm.run(*mine, "--prompt_template", "Q: {question}")
    assert done.returncode == 2 and str(folder / "mine") in done.stderr and "prompt" in done.stderr

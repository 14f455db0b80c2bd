"""Samples longer than a limit, through the public commands and on processors that count images in different ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models, tiny_models_more
from tests.pictures import COLOURS, png
from tests.questions import PROMPT, ask, picture
from vlm_sft.cli.main import main
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.oversized import LengthRule, Policy, fit
from vlm_sft.data.sample import OVERSIZED, UNSCALABLE

LIMIT = 120
CONTEXT = 512  # of the tiny model
HUGE, LONG = {"huge/a", "huge/b"}, {"long"}
SETTINGS = ("--max_new_tokens", "4", "--prompt_template", "{question}", "--tokens_per_pack", "512")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; normal rows, two questions about a gigantic picture, and an answer beyond the model's context."""
    folder = tmp_path_factory.mktemp("oversized")
    config = tiny_models.save("qwen2_5_vl", folder / "model") / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 4096', f'"max_position_embeddings": {CONTEXT}')
    )
    (folder / "rows").mkdir()
    rows: list[dict[str, Any]] = []
    for number, colour in enumerate(COLOURS):
        (folder / "rows" / f"{number}.png").write_bytes(png(colour, (60 + 8 * number, 56)))
        rows.append({"id": f"normal/{number}", "image": f"{number}.png", "question": "Colour?", "answer": colour})
    (folder / "rows" / "huge.png").write_bytes(png("red", (3000, 2000)))
    rows.append({"id": "huge/a", "image": "huge.png", "question": "Colour?", "answer": "red " * 12})
    rows.append({"id": "huge/b", "image": "huge.png", "question": "And its colour?", "answer": "red " * 14})
    rows.append({"id": "long", "image": "0.png", "question": "Say it all.", "answer": "so it is, " * 60})
    for split in ("train", "val", "test"):
        named = [json.dumps(row | {"id": f"{split}:{row['id']}"}) for row in rows]
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(named) + "\n")
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def named(rows: list[dict[str, Any]]) -> set[str]:
    """The ids of rows, without the data set and the split that they begin with."""
    return {row["id"].rpartition(":")[2] for row in rows}


def train(place: Path, name: str, *flags: str) -> tuple[int, Path]:
    settings = ("--base_model", str(place / "model"), "--dataset", str(place / "rows"), *SETTINGS)
    steps = ("--max_steps", "2", "--global_batch_size", "11", "--eval_strategy", "steps", "--eval_steps", "2")
    out = place / name
    quiet = ("--save_steps", "1", "--report_to", "none", "--cache_dir", str(place / f"{name} cache"))
    return main(["train", *settings, *steps, *quiet, "--output_dir", str(out), *flags]), out


def found(run: Path, part: str) -> dict[str, dict[str, Any]]:
    rows = [row for row in lines(run / "oversized.jsonl") if row["part"] == part]
    return {row["id"].rpartition(":")[2]: row for row in rows}


def test_kept_samples_beyond_the_context_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train(place, "keep")
    assert code == 0
    told = capsys.readouterr().err
    assert f"1 of 11 samples are longer than the model's context of {CONTEXT:,} tokens and are kept" in told
    for part in ("training", "evaluation loss", "rows"):
        (row,) = found(run, part).values()
        assert named([row]) == LONG and row["tokens"] > row["limit"] == CONTEXT and row["done"] == "kept"
    facts = json.loads((run / "data.json").read_text())
    assert facts["train"]["samples"] == 11 and not facts["left_out"]
    assert json.loads((run / "results.json").read_text())["benchmarks"]["rows"]["n"] == 11


def test_left_out_samples_are_counted_named_and_never_processed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max_length", str(LIMIT), "--oversized", "leave_out")
    code, run = train(place, "leave_out", *flags)
    assert code == 0  # without --max_left_out: it was asked for
    assert f"3 of 11 samples are longer than --max_length {LIMIT} and are left out" in capsys.readouterr().err
    gone = lines(run / "left_out.jsonl")
    assert named(gone) == HUGE | LONG and {row["reason"] for row in gone} == {OVERSIZED} and len(gone) == 6
    facts = json.loads((run / "data.json").read_text())
    assert facts["train"]["samples"] == facts["eval"]["samples"] == 8 and facts["left_out"] == {OVERSIZED: 6}
    record = json.loads((run / "run.json").read_text())
    assert record["engine"]["processed_images"] == 8 and record["questions_seen"] == 16
    assert json.loads((run / "results.json").read_text())["benchmarks"]["rows"]["n"] == 8
    assert set(found(run, "rows")) == HUGE | LONG
    # Other samples are another training.
    more = ("--resume", str(run / "checkpoint-1"))
    assert train(place, "leave_out", *more)[0] == 2
    assert "max_length was 120" in capsys.readouterr().err


def test_images_are_scaled_until_their_questions_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--max_length", str(LIMIT), "--oversized", "scale")
    assert train(place, "refused", *flags)[0] == 2  # an answer cannot be scaled, and nobody asked to leave it out
    assert UNSCALABLE in capsys.readouterr().err
    code, run = train(place, "scale", *flags, "--max_left_out", "0.1")
    assert code == 0
    assert named(lines(run / "left_out.jsonl")) == LONG
    facts = json.loads((run / "data.json").read_text())["train"]
    assert facts["samples"] == 10 and facts["images"] == 9
    rows = found(run, "training")
    assert {name: row["done"] for name, row in rows.items()} == {**dict.fromkeys(HUGE, "scaled"), "long": "left out"}
    assert rows["huge/a"]["scaled_images"] == rows["huge/b"]["scaled_images"]
    ((width, height),) = rows["huge/a"]["scaled_images"]
    assert rows["huge/a"]["images"] == [[3000, 2000]] and width / height == pytest.approx(1.5, rel=0.01)
    answered = lines(run / "evaluation" / "base" / "rows" / "predictions.jsonl")
    assert {row["image_pixels"] for row in answered if "huge" in row["id"]} == {width * height}
    planned = [*SETTINGS, *flags, "--max_left_out", "0.1", "--sft_config", "1epoch"]
    capsys.readouterr()
    assert main(["plan", "--base_model", str(place / "model"), "--dataset", str(place / "rows"), *planned]) == 0
    told = capsys.readouterr()
    assert "10 questions on 9 images" in told.out and "2 of 11 samples are longer" in told.err


def test_an_adapter_is_asked_as_it_was_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no flag says otherwise, in `eval`, `ask` and `export`; a checkpoint and an export carry it too."""
    flags = ("--max_length", str(LIMIT), "--oversized", "scale", "--max_left_out", "0.1", "--eval_benchmarks", "none")
    code, run = train(place, "travels", *flags, "--learning_rate", "0.05")
    assert code == 0
    exported = place / "exported"
    assert main(["export", "--adapter", str(run), "--output_dir", str(exported), "--questions", "1"]) == 0
    assert f"those that are too long: --max_length {LIMIT} --oversized scale, as in" in capsys.readouterr().out
    for folder in (run, run / "checkpoint-1", exported):
        saved = json.loads((folder / "prompt.json").read_text())
        assert (saved["max_length"], saved["oversized"]) == (LIMIT, "scale")
    asked = ["eval", "--benchmark", str(place / "rows"), "--max_left_out", "0.1"]
    shown = {}
    for name, more in (("recorded", ()), ("other", ("--oversized", "keep"))):
        assert main([*asked, *more, "--adapter", str(exported), "--output_dir", str(place / name)]) == 0
        told = capsys.readouterr().out
        assert (f"too long: --max_length {LIMIT} --oversized scale, as in the training" in told) == (name == "recorded")
        rows = lines(place / name / "rows" / "predictions.jsonl")
        shown[name] = {row["image_pixels"] for row in rows if "huge" in row["id"]}
        assert len(rows) == (10 if name == "recorded" else 11)
    assert shown["other"] == {6_000_000} and max(shown["recorded"]) < 200_000
    for more, words in (((), "the pictures are scaled down to"), (("--oversized", "keep"), "it is asked as it is")):
        command = ["ask", str(place / "rows" / "huge.png"), "Which colour? " * 4, "--adapter", str(run), *more]
        assert main(command) == 0
        assert words in capsys.readouterr().err


def test_an_evaluation_and_a_check_have_the_same_rule(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--base_model", str(place / "model"))
    asked = ["eval", *model, "--benchmark", str(place / "rows"), *SETTINGS, "--max_length", str(LIMIT)]
    answers = {}
    for policy, more in (("keep", ()), ("leave_out", ()), ("scale", ("--max_left_out", "0.1"))):
        out = place / f"eval {policy}"
        assert main([*asked, "--oversized", policy, *more, "--output_dir", str(out)]) == 0
        answers[policy] = named(lines(out / "rows" / "predictions.jsonl"))
        assert named(lines(out / "oversized.jsonl")) == HUGE | LONG
    normal = {f"normal/{number}" for number in range(8)}
    assert answers == {"keep": normal | HUGE | LONG, "leave_out": normal, "scale": normal | HUGE}
    assert "have their images scaled down to fit" in capsys.readouterr().err
    check = ["data", "check", str(place / "rows"), *model, "--output_dir", str(place / "check")]
    assert main([*check, "--max_length", str(LIMIT)]) == 0
    assert named(lines(place / "check" / "oversized.jsonl")) == HUGE | LONG
    assert main(["data", "check", str(place / "rows"), "--max_length", "9"]) == 2


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "llava", "internvl"])
def test_lengths_are_those_that_training_has(family: str) -> None:
    build = (tiny_models.FAMILIES | tiny_models_more.FAMILIES)[family]
    encoder = Encoder(build()[1], PROMPT)
    samples = [
        ask(picture(seed, (40 + 60 * seed, 50 + 40 * seed)), f"Number {seed}?", "7 " * seed, 0) for seed in range(6)
    ]
    lengths = dict(whole := [(one.id, tokens) for one, tokens in PreparedData(samples, encoder, "").sample_lengths()])
    limit = sorted(lengths.values())[2]
    rule = LengthRule(limit)
    assert {row.id: row.tokens for row in fit(samples, encoder, rule, "").found} == {
        name: tokens for name, tokens in whole if tokens > limit
    }
    for policy in ("leave_out", "scale"):
        fitted = fit(samples, encoder, replace(rule, policy=_policy(policy)), "")
        left = PreparedData(fitted.samples, encoder, "")
        assert all(tokens <= limit for _, tokens in left.sample_lengths()) and not left.left_out
        assert len(fitted.samples) + len(fitted.left_out) == 6
        scaled = [row for row in fitted.found if row.done == "scaled"]
        # LLaVA gives every picture as many tokens, InternVL every picture of one shape.
        assert bool(scaled) == (policy == "scale" and family not in ("llava", "internvl"))


def _policy(text: str) -> Policy:
    return "scale" if text == "scale" else "leave_out"

"""Own data with long answers, through the commands: room for them, no call for a short one, and cut answers told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import png
from tests.tiny_models import save
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.data.answer_limits import PLAIN_TEMPLATE, are_long, limit_for, longest_answer, room_for
from vlm_sft.data.chat import Chat
from vlm_sft.data.encode import Encoder
from vlm_sft.data.prompt import SHORT_ANSWER_TEMPLATE, PromptSettings
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.model.load import find_base

# Of pocket's own words, each once: 38 tokens, so the next one follows from the one before.
SENTENCE = (
    "The picture shows one red circle and two blue points above many green bars that stand below three large yellow "
    "labels whose price was highest between first year values under each white column over total share"
)
SHORT_LIMIT = 12
QUESTIONS = ("What is shown?", "What is it?", "Which picture?")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about twenty pictures whose answers are one sentence, and a run of pocket that learned it."""
    folder = tmp_path_factory.mktemp("answers")
    rows = []
    for number in range(20):
        (folder / f"{number}.png").write_bytes(png((10 * number, 90, 200 - 9 * number), (64, 48)))
        rows += [{"image": f"{number}.png", "question": text, "answer": SENTENCE} for text in QUESTIONS]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(
            [
                "train",
                "--base_model",
                "pocket",
                "--dataset",
                str(folder / "mine.jsonl"),
                "--output_dir",
                str(folder / "run"),
                "--num_train_epochs",
                "6",
                "--global_batch_size",
                "3",
                "--learning_rate",
                "4e-3",
                "--lora_dropout",
                "0",
                "--target_modules",
                "all-linear",
                "--lora_r",
                "32",
                "--max_grad_norm",
                "1",
                "--eval_strategy",
                "epoch",
                "--save_strategy",
                "epoch",
                "--load_best_model_at_end",
                "true",
                "--metric_for_best_model",
                "exact_match",
                "--report_to",
                "none",
            ]
        )
        == 0
    )
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(place: Path, name: str, *flags: str) -> dict[str, Any]:
    arguments = ["eval", "--base_model", "pocket", "--benchmark", str(place / "mine.jsonl"), "--output_dir"]
    assert main([*arguments, str(place / name), *flags]) == 0
    return read(place / name / "mine" / "results.json")


def test_a_sentence_is_learned_scored_and_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    row = read(run / "results.json")["benchmarks"]["mine"]
    assert row["tuned"]["accuracy"] == 1.0 and row["tuned"]["cut"] == 0
    prompt = read(run / "prompt.json")
    assert row["max_new_tokens"] == prompt["max_new_tokens"] == room_for(prompt["answer_tokens"]) > 32
    assert row["answer_tokens"] == prompt["answer_tokens"] > 32
    best = read(run / "run.json")["best"]
    assert best["metric"] == "exact_match" and best["value"] == 1.0
    assert f"max_new_tokens={prompt['max_new_tokens']})" in (run / "README.md").read_text()
    for folder in (run, run / f"checkpoint-{best['step']}"):
        again = evaluate(place, f"again-{folder.name}", "--adapter", str(folder))
        assert (again["accuracy"], again["max_new_tokens"]) == (1.0, prompt["max_new_tokens"])
    capsys.readouterr()
    assert main(["ask", str(place / "3.png"), "What is shown?", "--adapter", str(run)]) == 0
    assert f"tuned: {SENTENCE}\n" in capsys.readouterr().out


def test_the_base_alone_has_the_same_room(place: Path) -> None:
    prompt = read(place / "run" / "prompt.json")
    assert evaluate(place, "base")["max_new_tokens"] == prompt["max_new_tokens"]
    assert rows_of(place / "base" / "mine" / "predictions.jsonl") == rows_of(
        place / "run" / "evaluation" / "base" / "mine" / "predictions.jsonl"
    )


def test_answers_that_the_limit_ends_are_marked_counted_and_explained(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = ("--adapter", str(place / "run"))
    result = evaluate(place, "cut", *adapter, "--max_new_tokens", str(SHORT_LIMIT))
    told = capsys.readouterr()
    longest = read(place / "run" / "prompt.json")["answer_tokens"]
    assert result["accuracy"] == 0.0 and result["cut"] == result["n"] > 0
    rows = rows_of(place / "cut" / "mine" / "predictions.jsonl")
    assert all(row["cut"] is True and SENTENCE.startswith(row["prediction"]) for row in rows)
    assert line_with(told.err, "warning: ", f" {longest}") and f"--max_new_tokens {room_for(longest)}" in told.out
    assert line_with(told.out, f"{result['n']} of {result['n']} answers", f"limit of {SHORT_LIMIT} tokens")
    assert main(["ask", str(place / "3.png"), "What?", *adapter, "--max_new_tokens", str(SHORT_LIMIT)]) == 0
    assert line_with(capsys.readouterr().out, "[cut ", f" {SHORT_LIMIT} tokens", "--max_new_tokens")
    assert (
        main(
            ["score", "--benchmark", "exact_match", "--predictions", str(place / "cut" / "mine" / "predictions.jsonl")]
        )
        == 0
    )
    assert "cut by the limit" in capsys.readouterr().out
    assert main(["compare", str(place / "cut"), str(place / "base"), "--baseline", str(place / "base")]) == 0
    assert line_with(capsys.readouterr().out, f"{result['n']} of {result['n']} answers", "limit")


def test_a_training_with_a_limit_of_its_own_says_what_it_cut(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "limited"
    assert (
        main(
            [
                "train",
                "--base_model",
                "pocket",
                "--dataset",
                str(place / "mine.jsonl"),
                "--output_dir",
                str(run),
                "--max_steps",
                "1",
                "--max_new_tokens",
                f"mine={SHORT_LIMIT}",
                "--report_to",
                "none",
            ]
        )
        == 0
    )
    told = capsys.readouterr()
    assert line_with(told.err, "warning: ", "--max_new_tokens mine=")
    assert read(run / "prompt.json")["max_new_tokens"] == SHORT_LIMIT
    row = read(run / "results.json")["benchmarks"]["mine"]
    cut = [side["cut"] for side in (row["base"], row["tuned"])]
    counted = [
        sum(one["cut"] for one in rows_of(run / "evaluation" / side / "mine" / "predictions.jsonl"))
        for side in ("base", "tuned")
    ]
    assert cut == counted
    page = (run / "report.html").read_text()
    assert ("cut (base, tuned)" in told.out) == ("the limit is the likely reason" in page) == any(cut)
    assert evaluate(place, "limited-again", "--adapter", str(run))["max_new_tokens"] == SHORT_LIMIT


def test_mistakes_in_the_limit_are_told_before_anything_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "never"
    command = ["train", "--base_model", "pocket", "--dataset", str(place / "mine.jsonl"), "--output_dir", str(out)]
    for value in ("0", "chartqa=64"):
        code = main([*command, "--max_new_tokens", value])
        assert code == 2 and f"--max_new_tokens {value}" in capsys.readouterr().err
        assert not out.exists()


def test_sentences_are_not_asked_for_as_a_word_or_phrase(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base without a prompt of its own: the rule decides, and what it decided travels with the adapter."""
    model = save("qwen2_5_vl", place / "model")
    short = place / "short.jsonl"
    short.write_text(
        json.dumps({"image": "1.png", "question": "Which?", "answer": "light blue"})
        + "\n"
        + json.dumps({"image": "2.png", "question": "Which?", "answer": "blue"})
        + "\n"
    )
    for data, own in ((place / "mine.jsonl", PLAIN_TEMPLATE), (short, None)):
        run = place / f"rule-{data.stem}"
        assert (
            main(
                [
                    "train",
                    "--base_model",
                    str(model),
                    "--dataset",
                    str(data),
                    "--output_dir",
                    str(run),
                    "--max_steps",
                    "1",
                    "--eval_benchmarks",
                    "none",
                    "--verbose",
                    "--report_to",
                    "none",
                ]
            )
            == 0
        )
        assert ("single word or phrase" in capsys.readouterr().out) == (own is None)
        prompt = read(run / "prompt.json")
        assert (prompt["template"], prompt["own_template"]) == (SHORT_ANSWER_TEMPLATE, own)
        for flags in ((), ("--adapter", str(run))):
            out = place / f"rule-{data.stem}-{len(flags)}"
            assert (
                main(
                    [
                        "eval",
                        "--base_model",
                        str(model),
                        "--benchmark",
                        str(data),
                        "--output_dir",
                        str(out),
                        "--limit",
                        "1",
                        *flags,
                    ]
                )
                == 0
            )
            (asked,) = (read(path)["prompt"] for path in out.glob("*/results.json"))
            assert asked == prompt
    capsys.readouterr()
    assert (
        main(
            [
                "train",
                "--base_model",
                str(model),
                "--dataset",
                str(place / "mine.jsonl"),
                "--output_dir",
                str(place / "asked"),
                "--prompt_template",
                "Q: {question}",
                "--max_steps",
                "1",
                "--eval_benchmarks",
                "none",
                "--report_to",
                "none",
            ]
        )
        == 0
    )
    prompt = read(place / "asked" / "prompt.json")
    assert (prompt["template"], prompt["own_template"]) == ("Q: {question}", None)


def test_benchmarks_keep_their_wording_beside_own_data() -> None:
    prompt = PromptSettings(own_template=PLAIN_TEMPLATE)
    encoder = Encoder(find_base("pocket").processor, prompt)
    image = ImageRef.from_bytes(png("red", (64, 64)), "red.png")
    asked = {
        name: encoder.prompt_text(Sample("1", name, "", (image,), "What?", "", ()))
        for name in ("chartqa", "textvqa", "demo_charts", "mine", "ask", "ai2d", "ocrbench")
    }
    assert [name for name, text in asked.items() if "single word or phrase" in text] == [
        "chartqa",
        "textvqa",
        "demo_charts",
    ]
    other = Encoder(find_base("pocket").processor, PromptSettings(template="Q: {question}"))
    assert "Q: What?" in other.prompt_text(Sample("1", "ai2d", "", (image,), "What?", "", ()))
    pair = [
        Sample(str(n), name, "", (image,), "What?", "x", ("x",)) for n, name in enumerate(("chartqa", "mine", "ai2d"))
    ]
    group = encoder.encode(pair)
    for sample, question in zip(pair, group.questions, strict=True):
        alone = encoder.encode([sample])
        whole = [*group.prefix_ids, *question.prompt_ids]
        assert whole == [*alone.prefix_ids, *alone.questions[0].prompt_ids]


def test_the_rules() -> None:
    assert room_for(0) == room_for(10) == 32 and room_for(100) == 133
    assert are_long([SENTENCE]) and are_long(["yes"] * 40 + [SENTENCE])
    assert not are_long(["yes"] * 1000 + [SENTENCE]) and not are_long([])
    assert not are_long(["New York, NY 10001", "3.5 %"])
    assert are_long(["图中有一个红色的矩形和一个蓝色的圆"]) and not are_long(["红色的矩形"])
    plain = Chat(find_base("pocket").processor, ()).plain
    tokenizer = plain.tokenizer
    texts = ["go", SENTENCE, SENTENCE[:40]]
    assert longest_answer(texts, plain) == len(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
    named = "<|vision_start|><|image_pad|><|vision_end|>"
    assert longest_answer([named], plain) == len(plain.ids(named, leads=True)) > 30
    assert longest_answer([], plain) == 0 and longest_answer(["a" * 30], None) == 11
    trained = PromptSettings(max_new_tokens=20, answer_tokens=50)
    assert limit_for(trained, 50) == 20, "a limit that was asked for holds for data that is no longer"
    assert limit_for(trained, 51) == room_for(51) and limit_for(PromptSettings(), 5) == 32

"""The model card of pocket, made from its scores.json."""

from __future__ import annotations

from typing import Any

SCORES = "scores.json"
CARD = "README.md"

_CARD = """# pocket

A Qwen2.5-VL architecture with {millions:.2f} million parameters ({megabytes:.1f} MB in bfloat16) and its own
tokenizer, trained from random weights on pictures that are drawn by rule. It exists so that fine-tuning a
vision-language model can be tried, tested and measured on a laptop. It is no assistant: it has only seen short English
words, numbers, coloured shapes, signs and simple charts. Photographs and other languages are outside of that.

## Scores

Questions and pictures that were never in training; {rule}.

| questions | n | right | +- 95 % |
|---|---|---|---|
{rows}

demo_charts and demo_text are the synthetic benchmarks of this package in their own wording; of the ten answers of
demo_text only the most common one counts here. In training pocket meets other charts and signs of the same generator.
On signs it is asked in the benchmark's words too, on charts in other and fewer words only ("Oak > 30?", "Oak + Elm?").

## Training

{steps:,} of {planned} planned steps{unfinished}, {pictures:,} pictures, {questions:,} questions,
{minutes:.0f} minutes on {threads} thread(s) of a CPU, seed {seed}; {software}.

    scripts/train_pocket --output_dir DIR --steps {plan} --seed {seed} --export FOLDER

repeats it in a checkout of the repository; `--continue_from` and this folder go on from here. With one thread, the same
versions and the same processor the weights are the same bit for bit; elsewhere sums are rounded differently, and the
weights drift apart.{note}

Pictures and questions are made by `tools.pocket.curriculum`; no foreign data is used. During training the
vision tower also learns which character stands where, how labels are spelled, and which values, ranks and colours
belong to a label or to the end of a bar, through heads that no answer needs
(`tools/pocket/weights/training_heads.safetensors` in the repository; they are no part of the package); and five
attention heads of the language model are shown where the labels and the marks stand that a question is about.

License: Apache-2.0.
"""


def card(record: dict[str, Any]) -> str:
    """Write the model card.

    Args:
        record: what scores.json holds, see `score.export`.
    """
    training = record["training"]
    rows = [
        f"| {group} | {score['n']} | {score['accuracy']:.3f} | {score['plus_minus']:.3f} |"
        for group, score in record["scores"].items()
    ]
    return _CARD.format(
        millions=record["model"]["parameters"] / 1e6,
        megabytes=record["model"]["weights_bytes"] / 1e6,
        rule=record["rule"],
        rows="\n".join(rows),
        planned=f"{training['planned_steps']:,}" if training["planned_steps"] else "an open number of",
        plan=training["planned_steps"] or "N",
        unfinished="" if training["finished"] else " (exported before the end)",
        software=", ".join(f"{name} {version}" for name, version in record["software"].items()),
        note=f"\n\nThese weights: {record['note']}" if record["note"] else "",
        **{name: training[name] for name in ("steps", "pictures", "questions", "minutes", "threads", "seed")},
    )

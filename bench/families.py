"""What works for which model family: a tiny random model of each real architecture goes through every stage.

    python bench/families.py [--families internvl,molmo2] [--work DIR]
    python bench/families.py --tables     writes the table into docs/FAMILIES.md from the result file

Every stage is the public command on a model folder that plain transformers wrote. The models know nothing, so only
equalities count: tokens against the processor's own, shared against separate questions, the answers of the opened
adapter against those of the run, the merged folder against the adapter. Families that are examined again replace their
earlier entries in the result file; the others stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from cases import TAKE_ANSWERS
from common import RESULTS, ROOT, commit, made_at, origin, write_block
from tests import tiny_models
from tests.questions import PROMPT, questions
from vlm_sft.cli.main import main as command
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.sample import Sample
from vlm_sft.forecast.shapes import FAMILIES as SIZED
from vlm_sft.model.default_targets import default_targets
from vlm_sft.model.families import FAMILIES as DECLARED
from vlm_sft.model.feature_precompute import features_problem
from vlm_sft.model.last_layer import is_trimmed
from vlm_sft.model.load import find_base, load_model
from vlm_sft.model.sharing_check import choose_mode, sharing_error

RESULT = RESULTS / "families.json"
PAGE = ROOT / "docs" / "FAMILIES.md"
SIZES = ((72, 56), (56, 56), (150, 60))  # width and height in pixels of the pictures whose tokens are compared
TRAINED, HELD_OUT = 16, 4  # questions


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ",".join([*tiny_models.FAMILIES, *tiny_models.LACKING])
    parser.add_argument("--families", default=every, help="which families, with commas (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "families", help="of the models and runs")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result file")
    return parser.parse_args()


def examine(family: str, work: Path) -> dict[str, Any]:
    """Take a family through all stages.

    Args:
        family: `model_type` of its configuration.
        work: an empty folder for its model and its run.

    Returns:
        What was found, as JSON values; a stage that failed has its exit code.
    """
    began = time.monotonic()
    base = tiny_models.save(family, work / "base")
    found = {"family": family, "class": architecture(base), "declared": family in DECLARED, **computed(base)}
    found["train"] = trained(base, work)
    if found["train"]["exit_code"] == 0:
        found["reload"] = reloaded(base, work)
        found["merge"] = merged(work)
    return found | {"seconds": round(time.monotonic() - began, 1)}


def architecture(base: Path) -> str:
    """Name of the model's class."""
    return str(artifacts.read_json(base / "config.json")["architectures"][0])


def computed(base: Path) -> dict[str, Any]:
    """What the model itself shows: its tokens, whether and how exactly questions share their image, what is kept."""
    found = find_base(str(base), bf16=False, prompt=PROMPT)
    model = load_model(found).requires_grad_(False).eval()
    encoder = Encoder(found.processor, found.prompt, found.stop_ids)
    samples = [questions(seed, 3, size) for seed, size in enumerate(SIZES)]
    mode = choose_mode(model, encoder)
    return {
        "questions": sum(map(len, samples)),
        "other_tokens": sum(other_tokens(encoder, members) for members in samples),
        "shares": mode.shares,
        "note": mode.note,
        "difference": sharing_error(model, encoder, mode.kind) if mode.shares else None,
        "features": features_problem(model),
        "trimmed": is_trimmed(model),
        "sized": model.config.model_type in SIZED,
        "targets": list(default_targets(AutoConfig.from_pretrained(base))),
    }


def other_tokens(encoder: Encoder, samples: list[Sample]) -> int:
    """Questions of an image whose tokens, or the supervised ones among them, are not those of the processor itself."""
    group = encoder.encode(samples)
    wrong = 0
    for sample, question in zip(samples, group.questions, strict=True):
        ours = np.concatenate([group.prefix_ids, question.prompt_ids, question.answer_ids])
        asked, told = conversation(encoder, sample)
        same = np.array_equal(told[: len(ours)], ours) and len(asked) + len(question.answer_ids) == len(ours)
        answer = encoder.tokenizer.decode(question.answer_ids[:-1])
        wrong += not (same and answer.strip() == sample.target and int(question.answer_ids[-1]) in encoder.stop_ids)
    return wrong


def conversation(encoder: Encoder, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the processor's own call: the question alone, and the question with its answer."""
    processor, prompt = encoder.processor, encoder.prompt.template.replace("{question}", sample.question)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample.target}]}
    asked = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    told = processor.apply_chat_template([user, answer], tokenize=False, add_generation_prompt=False)
    pictures = [[decode_rgb(ref.load(), ref.source) for ref in sample.images]]
    by_itself: dict[str, Any] = {"suffix": [sample.target]} if type(processor).__name__ in TAKE_ANSWERS else {}
    calls: list[tuple[str, dict[str, Any]]] = [(asked, {}), (asked if by_itself else told, by_itself)]
    first, second = (processor(text=[text], images=pictures, return_tensors="pt", **more) for text, more in calls)
    return first["input_ids"][0].numpy(), second["input_ids"][0].numpy()


def trained(base: Path, work: Path) -> dict[str, Any]:
    """A training with its evaluation of base and adapter; LoRA goes where it does by default."""
    run = work / "run"
    code = command(
        [
            "train",
            "--base_model",
            str(base),
            "--dataset",
            "demo_charts",
            "--output_dir",
            str(run),
            "--cache_dir",
            str(work / "cache"),
            "--max_train",
            str(TRAINED),
            "--max_eval",
            str(HELD_OUT),
            "--num_train_epochs",
            "1",
            "--global_batch_size",
            "8",
            "--learning_rate",
            "1e-3",
            "--lora_r",
            "4",
            "--report_to",
            "none",
            "--feature_cache",
            "1GB",
        ]
    )
    if code:
        return {"exit_code": code}
    record = artifacts.read_json(run / artifacts.RUN)
    lines = (run / artifacts.METRICS).read_text(encoding="utf-8").splitlines()
    losses = [value["loss"] for value in map(json.loads, lines) if "loss" in value]
    results = artifacts.read_json(run / artifacts.RESULTS)["benchmarks"]["demo_charts"]
    return {
        "exit_code": 0,
        "steps": record["steps"],
        "losses": losses,
        "evaluated": results["n"],
        "shared": record["image_sharing"],
    }


def reloaded(base: Path, work: Path) -> dict[str, Any]:
    """The saved adapter, opened again by `eval`: how many of its answers are those of the run."""
    again = work / "eval"
    code = command(
        [
            "eval",
            "--base_model",
            str(base),
            "--adapter",
            str(work / "run"),
            "--benchmark",
            "demo_charts",
            "--limit",
            str(HELD_OUT),
            "--output_dir",
            str(again),
            "--cache_dir",
            str(work / "cache"),
        ]
    )
    if code:
        return {"exit_code": code}
    before, after = answers(work / "run" / artifacts.EVALUATION_FOLDER / "tuned"), answers(again)
    both = before.keys() & after.keys()
    return {"exit_code": 0, "questions": len(both), "identical": sum(before[key] == after[key] for key in both)}


def answers(folder: Path) -> dict[str, str]:
    """What an adapter said, by id of the question."""
    lines = map(json.loads, (folder / "demo_charts" / artifacts.PREDICTIONS).read_text(encoding="utf-8").splitlines())
    return {line["id"]: line["prediction"] for line in lines if "id" in line}


def merged(work: Path) -> dict[str, Any]:
    """The adapter put into the weights, held against it by plain transformers."""
    folder = work / "merged"
    code = command(
        ["export", "--adapter", str(work / "run"), "--merge", "--output_dir", str(folder), "--questions", "2"]
    )
    if code:
        return {"exit_code": code}
    check = artifacts.read_json(folder / artifacts.EXPORT)["verification"]
    names = ("questions", "identical_answers", "largest_difference", "tolerance")
    return {"exit_code": 0, **{name: check[name] for name in names}}


def table(result: dict[str, Any]) -> str:
    """Markdown table of the families, and the sentences of those that do not share."""
    lines = [
        f"Made with transformers {result['versions']['transformers']} and torch {result['versions']['torch']} on a "
        f"{result['device']}, {made_at(result['families'])}.",
        "",
        "| family | tokens and mask | image shared | trained | opened again | merged | features cached "
        "| last layer trimmed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(found) for found in result["families"]]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(result["families"]))])


def notes(families: list[dict[str, Any]]) -> list[str]:
    """What the columns have no room for, one sentence each."""
    there = [found for found in families if "missing" not in found]
    told = [f"{found['note']}." for found in there if found["note"]]
    usual = there[0]["targets"]
    for targets in dict.fromkeys(tuple(found["targets"]) for found in there if found["targets"] != usual):
        those = _named(found["family"] for found in there if tuple(found["targets"]) == targets)
        told.append(f"By default, LoRA goes to {_named(targets)} in {those}.")
    if sized := _named(found["family"] for found in there if found["sized"]):
        told.append(
            f"The forecast knows the sizes of {sized}. Elsewhere it counts them on the model itself, more roughly."
        )
    return told


def _named(names: Iterable[str]) -> str:
    """Names as code, in one line."""
    return ", ".join(f"`{name}`" for name in names)


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    if "missing" in found:
        return f"| `{found['family']}` | {found['missing']} |" + " |" * 6
    shares = f"yes ({found['difference']:.0e})" if found["shares"] else "no, see below"
    wrong = found["other_tokens"]
    cells = [
        f"`{found['family']}`",
        f"{found['questions'] - wrong} of {found['questions']}",
        shares,
        stage(found.get("train"), lambda part: f"{part['steps']} steps, {part['evaluated']} answers"),
        stage(found.get("reload"), lambda part: f"{part['identical']} of {part['questions']}"),
        stage(found.get("merge"), lambda part: f"{part['identical_answers']} of {part['questions']}"),
        f"no: {found['features']}" if found["features"] else "yes",
        "yes" if found["trimmed"] else "no",
    ]
    return f"| {' | '.join(cells)} |"


def stage(part: dict[str, Any] | None, told: Any) -> str:
    """The cell of one stage."""
    if part is None:
        return "not reached"
    return f"no (exit code {part['exit_code']})" if part["exit_code"] else told(part)


def main() -> None:
    """Examine the families and write the result file and the table."""
    args = parse()
    if not args.tables:
        torch.set_num_threads(1)
        found = []
        for family in args.families.split(","):
            work = args.work / family
            shutil.rmtree(work, ignore_errors=True)
            lacking = tiny_models.LACKING.get(family)
            one = {"family": family, "missing": lacking} if lacking else examine(family, work)
            found.append({**one, "commit": commit(origin())})
            say(row(found[-1]))
        known = {one["family"]: one for one in artifacts.read_json(RESULT)["families"]} if RESULT.is_file() else {}
        known |= {one["family"]: one for one in found}
        every = [*tiny_models.FAMILIES, *tiny_models.LACKING]
        artifacts.write_json(RESULT, {**origin(), "families": [known[name] for name in every if name in known]})
        say(f"result: {RESULT}")
    write_block("families", "What works for which", table(artifacts.read_json(RESULT)), PAGE)
    return say(f"table: {PAGE}")


if __name__ == "__main__":
    main()

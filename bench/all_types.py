"""What becomes of every type of image-text-to-text models that transformers has: success, or one clear line.

    python bench/all_types.py [--types aria,janus] [--work DIR]
    python bench/all_types.py --tables     writes the table into docs/FAMILIES.md from the result file

Types of tests/tiny_models_odd.py have a tiny model and a processor of their own. Every other type is built from its
default configuration with everything made small, and its language model takes a training step on random tokens; its
folder gets a processor that is not its own (LLaVA's, or Qwen2.5-VL's where the model takes grids of patches), as a user
might put a folder together. `vlm-sft train` is run on each folder, also without any processor, in a process with limits
of time and memory. bench/families.py takes the declared families through every stage. A type that was tried before is
replaced in the result file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

from common import RESULTS, ROOT, commit, made_at, origin, write_block
from tests import tiny_models, tiny_models_odd
from tests.tiny_models_parts import QWEN_TEMPLATE, byte_tokenizer, llava_processor
from tiny_configs import IMAGE, TOKENS, tiny_config
from vlm_sft.cli.main import main as command
from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import in_markdown
from vlm_sft.common.console import say
from vlm_sft.common.errors import ModelError
from vlm_sft.data.collate import collate
from vlm_sft.data.encode import EncodedGroup, EncodedQuestion
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import family_of
from vlm_sft.model.layout import require_layout
from vlm_sft.model.load import ready
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.train import run as _  # noqa: F401  (before processes are forked: each would import it again)

RESULT = RESULTS / "all_types.json"
PAGE = ROOT / "docs" / "FAMILIES.md"
MEMORY, SECONDS = 10 * 1024**3, 240
LARGEST = 300_000_000  # parameters of a model that is built
TRACEBACK = "Traceback"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(types()), help="which types, with commas (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "all_types", help="of the models and runs")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result file")
    return parser.parse_args()


def types() -> dict[str, Any]:
    """The configuration class of every type without a tiny model of its own in tests/, by name."""
    found = {kind.model_type: kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    return {name: found[name] for name in sorted(found.keys() - tiny_models.FAMILIES.keys())}


class RandomTokens:
    """Gives questions of random tokens behind a prefix of random tokens: what a model without a processor can read."""

    processor = None

    def encode(self, samples: list[Any], with_answers: bool = True) -> EncodedGroup:
        """Questions in place of the samples' own."""
        draw = np.random.default_rng(len(samples)).integers
        pairs = [draw(1, 255, (2, 4), np.int32) for _sample in samples]
        asked = [EncodedQuestion(str(n), ask, answer[: 4 * with_answers]) for n, (ask, answer) in enumerate(pairs)]
        return EncodedGroup("random", draw(1, 255, 7, np.int32), np.zeros(7, np.int32), 0, tuple(asked), {})


def examine(name: str, work: Path) -> dict[str, Any]:
    """Take a type as far as it goes.

    Args:
        name: its `model_type`.
        work: an empty folder.

    Returns:
        What was found, as JSON values: `config` and `layout` with "" or why not, `step`, and the outcome of commands.
    """
    if name in tiny_models_odd.MODELS:
        return examine_own(name, work)
    found: dict[str, Any] = {"type": name, "config": "", "layout": ""}
    try:
        config = tiny_config(types()[name])
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config)
        count = sum(parameter.numel() for parameter in empty.parameters())
        if count > LARGEST:
            raise ValueError(f"{count:,} parameters after all")
    except Exception as error:  # it cannot be made small by the names of its numbers, or lacks a package
        found["config"] = f"{type(error).__name__}: {first_line(error)}"
        config = types()[name]()
    try:
        require_layout(config, name)
    except ModelError as error:
        found["layout"] = error.what.partition(": ")[2]
    config.save_pretrained(work / "base")
    torch.manual_seed(0)
    if not found["config"]:
        model = AutoModelForImageTextToText.from_config(config).float()
        model.save_pretrained(work / "base")
        if not found["layout"]:
            found["step"] = step(model)
    found["bare"] = trained(work)
    takes_grids = False if found["config"] else "image_grid_thw" in str(type(model).forward.__annotations__)
    save_processor(work / "base", takes_grids)
    return found | {"train": trained(work)}


def examine_own(name: str, work: Path) -> dict[str, Any]:
    """As `examine`, with a processor of the type's own; a run tells how its packs are computed."""
    model, processor = tiny_models_odd.MODELS[name]()
    found: dict[str, Any] = {"type": name, "config": "", "layout": "", "own": True}
    try:
        require_layout(model.config, name)
    except ModelError as error:
        found["layout"] = error.what.partition(": ")[2]
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(work / "base")
    found["bare"] = trained(work)
    processor.save_pretrained(work / "base")
    found["train"] = trained(work)
    record = work / "run" / artifacts.RUN
    if found["train"]["exit_code"] == 0:
        found["shares"] = artifacts.read_json(record)["image_sharing"]
    return found


def step(model: Any) -> dict[str, Any]:
    """One forward and backward pass of an adapter over questions of random tokens, as a training takes it."""
    ready(model, SHARED_SDPA)
    try:
        targets = resolve_targets(model, family_of(model.config).targets)
    except ModelError as error:
        return {"error": error.what}
    tuned = add_lora(model, targets, r=2, alpha=4, dropout=0.0, seed=0, base_name="random")
    encoder: Any = RandomTokens()
    try:
        mode = choose_mode(tuned, encoder)
    except ModelError as error:
        return {"targets": len(targets.paths), "error": error.what}
    groups = [encoder.encode([None] * count) for count in (2, 3)]
    bundles = [Bundle(0, (0, 1)), Bundle(1, (0, 1, 2))] if mode.shares else [Bundle(0, (0,))]
    batch = collate(bundles, groups)
    with packed_forward.packed(batch, mode, 0):
        loss = packed_forward.token_losses(tuned, batch, mode).mean()
        loss.backward()
    slopes = [p.grad for p in tuned.parameters() if p.grad is not None]
    whole = bool(loss.isfinite()) and any(slope.abs().sum() > 0 for slope in slopes)
    return {"targets": len(targets.paths), "shares": mode.shares, "note": mode.note, "finite": whole}


def save_processor(folder: Path, takes_grids: bool) -> None:
    """Write a processor that is not the model's own: one picture token before a question."""
    picture = "<|image_pad|>" if takes_grids else TOKENS[IMAGE - 256]
    tokenizer = byte_tokenizer([picture, *TOKENS[1:]], eos_token="</s>", pad_token="<pad>")
    if not takes_grids:
        llava_processor(tokenizer).save_pretrained(folder)
        return
    size = {"shortest_edge": 784, "longest_edge": 12544}
    template = QWEN_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "").replace("<|im_end|>", "</s>")
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=size),
        chat_template=template,
    ).save_pretrained(folder)


def trained(work: Path) -> dict[str, Any]:
    """`vlm-sft train` for one step: its exit code, and the message of a failure."""
    (work / "rows").mkdir(exist_ok=True)
    rows = []
    for split in ("train", "validation", "test"):
        Image.new("RGB", (56, 56), "teal").save(work / "rows" / f"{split}.png")
        rows += [{"image": f"{split}.png", "question": f"{n}?", "answer": "1", "split": split} for n in range(2)]
    data = work / "rows" / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = ["train", "--base_model", str(work / "base"), "--dataset", str(data), "--output_dir", str(work / "run")]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = command([*line, "--max_steps", "1", "--eval_benchmarks", "none", "--report_to", "none"])
    lines = [text for text in told.getvalue().splitlines() if text.startswith("error: ")]
    message = lines[-1].removeprefix("error: ").replace(str(work / "base"), "FOLDER") if code and lines else ""
    return {"exit_code": code, "message": message, "errors": len(lines)}


def first_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long."""
    return " ".join(str(error).split())[:200]


def alone(work: Callable[[], dict[str, Any]], path: Path, seconds: int = SECONDS) -> dict[str, Any]:
    """Run something in a process of its own, with limits; a crash is a result, too.

    Args:
        work: what is run.
        path: where its result goes.
        seconds: the longest that it may take.
    """

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            found = work()
        except BaseException as error:
            found = {"crash": f"{type(error).__name__}: {first_line(error)}", TRACEBACK: traceback.format_exc()}
        artifacts.write_json(path, found)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        return {"crash": f"it took more than {seconds} s"}
    return artifacts.read_json(path) if path.is_file() else {"crash": f"exit code {process.exitcode}"}


def outcome(found: dict[str, Any]) -> tuple[str, str]:
    """One word that a type falls under in the table, and what is said beside it."""
    if "crash" in found:
        return "crash", found["crash"]
    if found["layout"]:
        return "refused", found["layout"]
    train = found["train"]
    if train["exit_code"] == 0:
        if not found.get("own"):
            return "trains", ""
        return "trains", "shares images" if found["shares"] else "one question per sequence"
    return "stops", train["message"]


def table(result: dict[str, Any]) -> str:
    """Markdown table of the types."""
    counts: dict[str, int] = {}
    rows = []
    for found in result["types"]:
        word, told = outcome(found)
        counts[word] = counts.get(word, 0) + 1
        owner = "own" if found.get("own") else "–" if word == "refused" else "borrowed"
        rows.append(f"| `{found['type']}` | {owner} | {built(found)} | {word} | {in_markdown(told)} |")
    lines = [
        f"Made with transformers {result['versions']['transformers']} and torch {result['versions']['torch']}, "
        f"{made_at(result['types'])}: {', '.join(f'{count} {word}' for word, count in sorted(counts.items()))}.",
        "",
        "With its own processor, a type shows whether it can be trained. With the processor of another family, a run "
        "that stops shows only that it ends with one message. `not built small`: a small version of the default "
        "configuration builds no model, so the folder has no weights.",
        "",
        "| type | processor | language model on random tokens | `vlm-sft train` | message |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *rows])


def built(found: dict[str, Any]) -> str:
    """The cell about the language model."""
    step = found.get("step")
    if step is None:
        return "not built small" if found.get("config") else "–"
    if "error" in step:
        return in_markdown(step["error"])
    return ("shares" if step["shares"] else "one question a sequence") + ("" if step["finite"] else ", no gradient")


def main() -> None:
    """Examine the types and write the result file and the table."""
    args = parse()
    if not args.tables:
        torch.set_num_threads(1)
        found = []
        names = args.types.split(",")
        for name in names:
            work = args.work / name
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            result = alone(lambda name=name, work=work: examine(name, work), work / "found.json")  # type: ignore[misc]
            found.append({"type": name, **result, "commit": commit(origin())})
            say(f"{name}: {': '.join(outcome(found[-1]))} [{built(found[-1])}]")
            if TRACEBACK in found[-1]:
                sys.stderr.write("".join(found[-1].pop(TRACEBACK).splitlines(keepends=True)[-14:]))
        known = {one["type"]: one for one in artifacts.read_json(RESULT)["types"]} if RESULT.is_file() else {}
        known |= {one["type"]: one for one in found}
        artifacts.write_json(RESULT, {**origin(), "types": [known[name] for name in types() if name in known]})
        say(f"result: {RESULT}")
    write_block("all_types", "Every other type", table(artifacts.read_json(RESULT)), PAGE)
    return say(f"table: {PAGE}")


if __name__ == "__main__":
    main()

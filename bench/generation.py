"""Speed of shared-prefix generation against plain generation, one question at a time, on the same real questions.

    python bench/generation.py [--data DIR] [--questions N] [--models pocket,small,medium] [--max_new_tokens N]
    python bench/generation.py --tables     writes the table into bench/README.md from the result files

Both sides answer the same ChartQA rows, whole images with all their questions, in float32, in one process and in turn;
the answers are compared. Where the processor has bfloat16, shared prefixes are timed in it, too. `small` and `medium`
are the shapes of the throughput benchmark: random weights under the real Qwen vocabulary, so that their answers run to
the limit of tokens. A trained model stops after a few: `pocket` is one, and `answer_tokens` says how long answers were.
A result file names versions, device, command and git hash.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import shapes
from cases import choose
from common import DATA, README, RESULTS, ROOT, commit, origin, write_block
from peers.environment import DEFAULT_FOLDER
from vlm_sft.common import artifacts
from vlm_sft.common.console import progress, say
from vlm_sft.common.record import bfloat16_flags
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.distributed.launch import CPU_PACK_TOKENS, quiet_libraries
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.evaluate.batching import image_counter, plan_packs
from vlm_sft.evaluate.tasks import load_tasks
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.load import Base, find_base, load_model, set_attention

SHAPE_PIXELS = 200_704  # 256 image tokens; pocket keeps its own bound
# The tied head of a fresh model gives nearly equal scores to all words, and a trained one does not. A gain on its last
# norm spreads them, or rounding would choose among ties; the work is the same.
SPREAD = 12.0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="ChartQA parquet files (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="a seeded sample of so many (default: %(default)s)")
    parser.add_argument("--models", default="pocket,small", help="pocket, or random shapes: small, medium")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_FOLDER, help="tokenizer and models (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="limit of an answer (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result files")
    return parser.parse_args()


def load(name: str, work: Path, bf16: bool) -> tuple[Base, Any]:
    """A base and its model: the embedded one, or a random shape written into the folder `work`."""
    if name == "pocket":
        base = find_base("pocket", bf16=bf16)
        return base, load_model(base).requires_grad_(False).eval()
    tokenizer = shapes.fetch_tokenizer(work / "tokenizer")
    folder = shapes.build(name, work / "work" / f"generation-{name}", tokenizer, SHAPE_PIXELS)
    base = find_base(str(folder), bf16=bf16)
    model = load_model(base).requires_grad_(False).eval()
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(SPREAD)
    return base, model


def whole_images(samples: list[Sample], questions: int) -> list[Sample]:
    """A seeded sample of whole images with exactly so many questions together."""
    groups: dict[str, list[Any]] = {}
    for sample in samples:
        groups.setdefault(sample.image_key, []).append((sample, ""))
    chosen = choose(groups, min(questions, len(samples)), one_an_image=False)
    return [sample for members in chosen.values() for sample, _ in members]


def shared(backend: SharedPrefixBackend, samples: list[Sample], limit: int) -> tuple[dict[str, str], float]:
    """Answers of this package and the seconds they took."""
    began = time.perf_counter()
    packs = plan_packs(samples, image_counter(backend.encoder.processor), CPU_PACK_TOKENS)
    answers = {sample.id: text for pack in backend.answers(packs, limit) for sample, text, _ in pack}
    return answers, time.perf_counter() - began


@torch.no_grad()
def plain(backend: SharedPrefixBackend, samples: list[Sample], limit: int) -> tuple[dict[str, str], float]:
    """Answers of transformers' generate, one question at a time, and the seconds they took."""
    model, processor, encoder = backend.model, backend.base.processor, backend.encoder
    set_attention(model, "sdpa")
    answers = {}
    began = time.perf_counter()
    with progress(len(samples), "one at a time", "questions") as bar:
        for sample in samples:
            pictures = [decode_rgb(image.load(), image.source) for image in sample.images]
            inputs = processor(text=[encoder.prompt_text(sample)], images=[pictures], return_tensors="pt")
            ids = model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, eos_token_id=list(encoder.stop_ids), pad_token_id=0
            )
            tokens = ids[0, inputs["input_ids"].shape[1] :]
            answers[sample.id] = encoder.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            bar.advance()
    seconds = time.perf_counter() - began
    set_attention(model, SHARED_SDPA)
    return answers, seconds


def prepared(name: str, work: Path, samples: list[Sample], bf16: bool) -> SharedPrefixBackend:
    """What answers with a model in one number format, once it has paid for what is set up in the first call."""
    backend = SharedPrefixBackend(*load(name, work, bf16))
    shared(backend, samples[:2], 2)
    return backend


def measure(name: str, samples: list[Sample], args: argparse.Namespace) -> dict[str, Any]:
    """Time both sides in turn on one model and compare the answers."""
    backend = prepared(name, args.work, samples, bf16=False)
    base, model = backend.base, backend.model
    narrow = prepared(name, args.work, samples, bf16=True) if bfloat16_flags() else None
    rounds = []
    for _ in range(args.rounds):
        ours, our_seconds = shared(backend, samples, args.max_new_tokens)
        theirs, their_seconds = plain(backend, samples, args.max_new_tokens)
        rounds.append({"shared": round(our_seconds, 3), "plain": round(their_seconds, 3)})
        if narrow:
            rounds[-1]["bfloat16"] = round(shared(narrow, samples, args.max_new_tokens)[1], 3)
        say(f"{name}: {json.dumps(rounds[-1])} seconds")
    middle = {side: statistics.median(one[side] for one in rounds) for side in rounds[0]}
    different = [key for key in theirs if ours[key] != theirs[key]]
    lengths = [len(backend.encoder.tokenizer(text)["input_ids"]) for text in theirs.values()]
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "questions": len(samples),
        "images": len({sample.image_key for sample in samples}),
        "max_new_tokens": args.max_new_tokens,
        "answer_tokens": {"mean": round(statistics.mean(lengths), 2), "largest": max(lengths)},
        "max_pixels": base.prompt.max_pixels,
        "rounds_seconds": rounds,
        "questions_per_second": {side: round(len(samples) / seconds, 3) for side, seconds in middle.items()},
        "speedup": round(statistics.median(one["plain"] / one["shared"] for one in rounds), 2),
        "bfloat16_speedup": round(statistics.median(one["shared"] / one["bfloat16"] for one in rounds), 2)
        if narrow
        else None,
        "different_answers": len(different),
        "examples_of_different": different[:3],
    }


def tables() -> str:
    """The table of all result files, as Markdown."""
    lines = [
        "| model | parameters | questions / images | tokens an answer | one at a time, questions/s "
        "| shared prefixes, questions/s | speedup | in bfloat16 | different answers | device | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for path in sorted(RESULTS.glob("generation_*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        for row in run["rows"]:
            times = row.get("bfloat16_speedup")
            narrow = f"{times:.1f}x" if times else "not measured"
            lines.append(
                f"| {row['model']} | {row['parameters']:,} | {row['questions']:,} / {row['images']:,} "
                f"| {row['answer_tokens']['mean']:.1f} | {row['questions_per_second']['plain']:.2f} "
                f"| {row['questions_per_second']['shared']:.2f} "
                f"| {row['speedup']:.1f}x | {narrow} | {row['different_answers']} | {run['device']} | {commit(run)} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Measure, write the result file, and write the table."""
    args = parse()
    if args.tables:
        write_block("generation", "Generation", tables())
        return 0
    if not args.data.is_dir():
        say(f"skipped: {args.data} is not there; pass --data with a folder of ChartQA parquet files")
        return 0
    quiet_libraries()
    (task,), _ = load_tasks(parse_datasets(f"chartqa@{args.data}"), None, "validation")
    samples = whole_images(task.samples, args.questions)
    rows = []
    for name in args.models.split(","):
        rows.append(measure(name, samples, args))
        say(json.dumps(rows[-1], indent=2))
    result = origin() | {"data": "ChartQA validation", "rows": rows}
    name = f"generation_{args.models.replace(',', '_')}_{len(samples)}.json"
    path = artifacts.write_json(RESULTS / name, result)
    write_block("generation", "Generation", tables())
    say(f"written: {path.relative_to(ROOT)} and {README.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""All five recipes measured: trained, evaluated and compared with what they cost.

    python bench/recipes.py --max_train 4500 --learning_rate 1e-3 --global_batch_size 16    pocket on the demo mixture
    python bench/recipes.py --dataset easy_vqa …                                            pocket on easy-VQA
    python bench/recipes.py --base_model Qwen/Qwen2.5-VL-7B-Instruct --dataset chartqa,textvqa --flash_attn \\
        --launcher "deepspeed --num_gpus=8 --module vlm_sft"                         the real thing
    python bench/recipes.py --ablation …     the best recipe with one value changed at a time
    python bench/recipes.py --tables         only writes tables and figures from the recorded results

It can be stopped at any time; the same command goes on. Every finished run updates the result file and the documents.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from common import RESULTS, ROOT
from recipe_documents import write_documents
from recipe_results import file_name, write
from recipe_runs import Arm, Settings, ablation_arms, claim, default_launcher, missing, recipe_arms, run_missing
from vlm_sft.common.console import progress, say, warn
from vlm_sft.common.errors import VlmSftError


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base_model", default="pocket", help="pocket, a folder or a Hub id (default: %(default)s)")
    parser.add_argument("--dataset", default="demo_charts,demo_text", help="as in vlm-sft train (default: %(default)s)")
    parser.add_argument("--max_train", type=int, metavar="N", help="questions of a training (default: all)")
    parser.add_argument("--max_eval", type=int, metavar="N", help="questions a benchmark (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings a row (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, metavar="X", help="every recipe also with this learning rate")
    parser.add_argument("--global_batch_size", type=int, metavar="N", help="… with so many questions a step")
    parser.add_argument("--ablation", action="store_true", help="the best recipe with one value changed at a time")
    parser.add_argument("--flash_attn", action="store_true", help="pass --flash_attn to every command")
    parser.add_argument("--launcher", metavar="WORDS", help="what starts vlm_sft (default: this Python, one process)")
    parser.add_argument("--runs", type=int, metavar="N", help="end after N trainings; the same command goes on")
    parser.add_argument("--work_dir", type=Path, help="folder of the runs (default: outputs/recipes/MODEL-DATA)")
    parser.add_argument("--note", metavar="TEXT", help="what a reader has to know, e.g. that the machine was shared")
    parser.add_argument("--tables", action="store_true", help="only write tables and figures from the result files")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings, with the place of the runs filled in."""
    settings = Settings(
        base_model=args.base_model,
        dataset=args.dataset,
        max_train=args.max_train,
        max_eval=args.max_eval,
        seeds=tuple(range(1, args.seeds + 1)),
        learning_rate=args.learning_rate,
        global_batch_size=args.global_batch_size,
        launcher=tuple(shlex.split(args.launcher)) if args.launcher else default_launcher(),
        flash_attn=args.flash_attn,
        work_dir=args.work_dir or Path(),
    )
    if args.work_dir:
        return settings
    kind = "ablation" if args.ablation else "recipes"
    place = ROOT / "outputs" / "recipes" / file_name(kind, settings).removesuffix(".json")
    return Settings(**{**vars(settings), "work_dir": place})


def measure(kind: str, settings: Settings, arms: list[Arm], at_most: int | None, note: str | None) -> None:
    """Carry out what is missing; results and documents are up to date after each run."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    claim(settings)
    todo = missing(settings, arms)
    total = len(settings.seeds) * len(arms)
    say(f"{total} trainings in {settings.work_dir}: {total - len(todo)} are done, {len(todo)} are missing")
    with progress(len(todo[:at_most]), "recipes", "trainings") as bar:
        for arm, seed in run_missing(settings, arms, at_most):
            write(kind, settings, arms, note)
            bar.note(f"{arm.kind} {arm.recipe} ({arm.variant}), seed {seed}")
            bar.advance()
    path = write(kind, settings, arms, note)
    write_documents()
    say(f"written: {path} and the tables of docs/ (from all files in {RESULTS.relative_to(ROOT)})")
    left = len(missing(settings, arms))
    again = f"the same command again, for the {left} missing trainings"
    say(f"next: {again if left else 'read docs/CONFIGS_COMPARISON.md'}")


def main() -> int:
    """Measure, or only write the documents."""
    args = parse()
    try:
        if args.tables:
            say("written: " + ", ".join(str(path.relative_to(ROOT)) for path in write_documents()))
            return 0
        settings = settings_of(args)
        kind = "ablation" if args.ablation else "recipes"
        arms = ablation_arms(settings) if args.ablation else recipe_arms(settings)
        measure(kind, settings, arms, args.runs, args.note)
    except VlmSftError as error:
        warn(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`vlm-sft verify`: prove on a run's own configuration that a killed training resumes exactly."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "check a run's checkpoints, then train a few steps of it, kill it, resume it, and compare bit for bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a training, finished or not")
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        metavar="N",
        help="optimizer steps of the trial, at least 4 (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="where the trial runs (default: RUN/verify); it is not deleted"
    )
    parser.add_argument("--checkpoints_only", action="store_true", help="compare checksums, and train nothing")


def run(args: argparse.Namespace) -> int:
    """Verify; 0 when everything is as it should be, 1 when not."""
    from vlm_sft.common import artifacts
    from vlm_sft.common.console import say
    from vlm_sft.common.idle import refuse_idle
    from vlm_sft.train.resume_check import IDLE, verify

    refuse_idle(args, IDLE, args.given)
    found = verify(args.run, args.steps, args.output_dir, args.checkpoints_only)
    if found.exact is None:
        say(f"{len(found.damaged)} damaged; next: vlm-sft train … --resume auto takes the newest that is whole")
        return int(not found)
    say("exact: a killed training of this configuration loses nothing" if found.exact else "NOT exact: see the logs")
    say(f"written: {found.folder}/{artifacts.VERIFY}, with both trainings and their logs beside it")
    say("next: put --resume auto into the launch line" if found.exact else f"next: compare the logs in {found.folder}")
    return int(not found)

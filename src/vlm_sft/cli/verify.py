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
    from vlm_sft.cli.parser import refuse_idle
    from vlm_sft.common import artifacts
    from vlm_sft.common.console import say
    from vlm_sft.common.errors import RunError
    from vlm_sft.train.resume_check import scratch_folder, tell_checkpoints, verify_run

    if args.checkpoints_only:
        refuse_idle(args, ("steps", "output_dir"), "with --checkpoints_only, which trains nothing", "leave it out")
    if args.steps < 4:
        raise RunError(f"--steps {args.steps} is below 4", "the trial needs a checkpoint and steps after it")
    if not (args.run / artifacts.RUN).is_file():
        raise RunError(f"{args.run} holds no {artifacts.RUN}", "pass the output folder of a training")
    broken = tell_checkpoints(args.run)
    if args.checkpoints_only:
        say(f"{len(broken)} damaged; next: vlm-sft train … --resume auto uses the newest intact one")
        return int(bool(broken))
    scratch = scratch_folder(args.output_dir or args.run / "verify")
    same = verify_run(args.run, scratch, args.steps)
    artifacts.write_json(
        scratch / artifacts.VERIFY,
        {"schema": 1, "steps": args.steps, "resume_is_exact": same, "damaged_checkpoints": broken},
    )
    say(f"{'exact: a killed training of this configuration loses nothing' if same else 'NOT exact: see the logs'}")
    say(f"written: {scratch / artifacts.VERIFY}, with both trainings and their logs beside it")
    say("next: put --resume auto into the launch line" if same else f"next: compare the logs in {scratch}")
    return int(not same or bool(broken))

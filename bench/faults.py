r"""Kills, full disks and damaged files, on the launch line; writes a record and the table of docs/RELIABILITY.md.

    python bench/faults.py --kills 200 --cold 10 --ranks 6 --deepspeed 6 --workers 6 --disk 12 --eio 30 --damage 20 \
        --soak 200

Every number is how many of that kind to do now; `--add` adds them to the record of earlier calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit, device_of, origin, write_block, write_record
from tests.faults.damage import FAULTS, damage_everything, starve, strike
from tests.faults.harness import MOMENTS, Reference, Tally, arguments, make_place, torture
from tests.faults.injection import layer
from tests.processes import Started, Warm, start_cold, start_deepspeed, start_ranks
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

RECORD = RESULTS / "faults.json"
PAGE = ROOT / "docs" / "RELIABILITY.md"
KILLS_A_TRAINING = 5
# In the order in which a training comes by them; "finishing" comes once.
STEPS_A_KILL = 8  # of the soak: about as many as a run takes until it is killed
FEW = 20  # runs whose memory is compared with that of the last ones
SOAK = "one process, one folder (soak)"
COURSE = ("caching", "training", "saving", "evaluating", "sealing", "rotating", "anywhere", "finishing")


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs of runs forked from a warm process")
    parser.add_argument("--cold", type=int, default=0, help="SIGKILLs of runs started by the launch line itself")
    parser.add_argument("--ranks", type=int, default=0, help="SIGKILLs of runs on two ranks under torchrun")
    parser.add_argument("--deepspeed", type=int, default=0, help="SIGKILLs of runs on two ranks under DeepSpeed")
    parser.add_argument("--soak", type=int, default=0, help="SIGKILLs of one long training in one folder")
    parser.add_argument("--workers", type=int, default=0, help="SIGKILLs of runs with two loader workers")
    parser.add_argument("--disk", type=int, default=0, help="full and read-only disks; needs the right to mount")
    parser.add_argument("--eio", type=int, default=0, help="disk errors in calls of a run; needs a C compiler")
    parser.add_argument("--damage", type=int, default=0, help="changed bytes in every file that is read back")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="add to the record of earlier calls")
    args = parser.parse_args()
    record = json.loads(RECORD.read_text()) if args.add and RECORD.is_file() else {"parts": {}, "damage": {}}
    with tempfile.TemporaryDirectory(prefix="vlm_sft_faults") as name:
        record, troubles = _carry_out(args, make_place(Path(name)), record)
    path = _kept(record)
    write_block("faults", "What the fault harness found", table(artifacts.read_json(RECORD)), PAGE)
    say(f"record: {path}\ntable: {PAGE}")
    for trouble in troubles:
        say(f"trouble: {trouble}")
    return 1 if troubles else 0


def _carry_out(args: argparse.Namespace, place: Path, record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Do every part; the record is on disk after each training. Returns it, and what went wrong."""
    rng = random.Random(args.seed)
    warm = Warm()
    troubles: list[str] = []
    try:
        output = place / "reference"
        if warm.start(arguments(place, output), place / "log").wait(300) != 0:
            sys.exit((place / "log").read_text())
        reference = Reference.of(output)
        parts = (
            ("one process, forked", args.kills, warm.start, ()),
            ("one process, launch line", args.cold, start_cold, ()),
            # Ranks that share out the images compute vision features in other batches, with other roundings.
            ("two ranks, torchrun", args.ranks, start_ranks, _shared_cache(place)),
            ("two ranks, deepspeed", args.deepspeed, start_deepspeed, _shared_cache(place)),
            ("two loader workers, forked", args.workers, warm.start, ("--dataloader_num_workers", "2")),
        )
        for name, kills, begin, more in parts:
            tally = Tally()
            several = begin in (start_ranks, start_deepspeed)
            expected = _reference_of(begin, place, "reference_ranks") if several and kills else reference
            while sum(tally.kills.values()) < kills and not tally.trouble:
                count = min(KILLS_A_TRAINING, kills - sum(tally.kills.values()))
                course = COURSE[1:] if several else COURSE
                moments = sorted(rng.choices(course, k=count), key=COURSE.index)
                folder = place / f"{name}{tally.finished}"
                torture(begin, place, expected, moments, folder, tally, rng, more, say)
                shutil.rmtree(folder)
                _kept(_merged(record, name, tally))
            record = _merged(record, name, tally)
            troubles += tally.trouble
        if args.soak:
            record = _merged(record, SOAK, tally := soak(warm.start, place, args.soak, rng))
            _kept(record)
            troubles += tally.trouble
        tally = Tally()
        for number in range(args.disk):
            fault = FAULTS[number % len(FAULTS)]
            starve(warm.start, place, reference, fault, place / f"disk{number}", tally, rng)
            say(f"{fault}: {tally.kills}")
        if args.eio:
            strike_often(args.eio, place, reference, tally, rng)
        record = _merged(record, "disk", tally)
        troubles += tally.trouble
        if args.damage:
            with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):  # a warning for each of them
                found = damage_everything(output, place / "cache", args.damage, max(1, args.damage // 4), rng)
            for kind, (done, seen) in found.items():
                old = record["damage"].get(kind, [0, 0])
                record["damage"][kind] = [old[0] + done, old[1] + seen]
    finally:
        warm.close()
    return record, troubles


def strike_often(times: int, place: Path, reference: Reference, tally: Tally, rng: random.Random) -> None:
    """Disk errors in so many runs, each of which is resumed on a sound disk."""
    warm = Warm(layer(place))
    try:
        for number in range(times):
            folder = place / f"eio{number}"
            strike(warm, place, reference, ("continue", "stop")[number % 2], folder, tally, rng)
            shutil.rmtree(folder)
            say(f"disk errors: {number + 1} of {times}")
    finally:
        warm.close()


def soak(begin: Callable[[list[str], Path], Started], place: Path, kills: int, rng: random.Random) -> Tally:
    """Kill one long training so many times, in one folder, with nobody looking after it."""
    tally, steps = Tally(), ("--max_steps", str(kills * STEPS_A_KILL))
    reference = _reference_of(begin, place, "reference_soak", *steps)
    moments = ["anywhere"] * kills
    torture(begin, place, reference, moments, place / "soak", tally, rng, (*steps, *_shared_cache(place)), say)
    return tally


def _shared_cache(place: Path) -> tuple[str, str]:
    return "--cache_dir", str(place / "cache")


def _reference_of(begin: Callable[[list[str], Path], Started], place: Path, name: str, *more: str) -> Reference:
    """An uninterrupted run as `begin` starts it: two ranks round otherwise than one."""
    output = place / name
    shutil.rmtree(output, ignore_errors=True)
    if begin(arguments(place, output, *more), place / "log").wait(1800) != 0:
        sys.exit((place / "log").read_text())
    return Reference.of(output)


def _kept(record: dict[str, Any]) -> Path:
    """Write the record, with where it comes from."""
    return write_record(RECORD, record | origin(), covered)


def covered(record: dict[str, Any]) -> dict[str, float]:
    """How much was done of each part."""
    parts = {name: sum(part["kills"].values()) for name, part in record["parts"].items()}
    return parts | {name: done for name, (done, _) in record["damage"].items()}


def _merged(record: dict[str, Any], name: str, tally: Tally) -> dict[str, Any]:
    """The record with the counts of one part added."""
    new = asdict(tally)
    if not new["kills"]:
        return record
    old = record["parts"].get(name)
    if old is not None:
        new["kills"] = {key: old["kills"].get(key, 0) + new["kills"].get(key, 0) for key in old["kills"] | new["kills"]}
        for key in ("finished", "identical", "left_over"):
            new[key] += old[key]
        new["peaks_mib"] = old.get("peaks_mib", []) + new["peaks_mib"]
        new["trouble"] = old["trouble"] + new["trouble"]
        new["most_lost_steps"] = max(old["most_lost_steps"], new["most_lost_steps"])
    return record | {"parts": record["parts"] | {name: new}}


def table(record: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = [
        f"Made on {device_of(record)}, commit {commit(record)}, the last part on {record['made'][:10]}.",
        "",
        "| how it was launched | killed while | kills | trainings finished | bit-identical to the uninterrupted one | "
        "steps lost, at most |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in record["parts"].items():
        if name == "disk":
            continue
        kills = ", ".join(f"{moment} {part['kills'][moment]}" for moment in MOMENTS if moment in part["kills"])
        lines.append(
            f"| {name} | {kills} | {sum(part['kills'].values())} | {part['finished']} | {part['identical']} | "
            f"{part['most_lost_steps']} |"
        )
    peaks = record["parts"].get(SOAK, {}).get("peaks_mib", [])
    if len(peaks) >= 2 * FEW:
        lines.append("")
        lines.append(
            f"Peak memory of a run in the soak: median {statistics.median(peaks[:FEW]):,.0f} MiB over the first {FEW} "
            f"kills, {statistics.median(peaks[-FEW:]):,.0f} MiB over the last {FEW} of {len(peaks)}."
        )
    disk = record["parts"].get("disk")
    if disk:
        lines += ["", "| disk, and how the run ended | runs |", "|---|---|"]
        lines += [f"| {what} | {count} |" for what, count in sorted(disk["kills"].items())]
        lines.append("")
        lines.append(
            f"With a sound disk again, {disk['finished']} of {sum(disk['kills'].values())} were resumed to the "
            f"end and {disk['identical']} came to the adapter of an undisturbed run, bit for bit."
        )
    lines += ["", "| damaged file | times | found |", "|---|---|---|"]
    lines += [f"| {kind} | {done} | {seen} |" for kind, (done, seen) in record["damage"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

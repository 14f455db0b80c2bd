"""Situations that users and others' files bring about, through the public command; tables of docs/RELIABILITY.md.

    python bench/situations.py                     all of them
    python bench/situations.py one_question …      some of them, again

Every one is played in a folder of its own; what came of it is in the record as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit, origin, with_block
from tests.faults.situations import SITUATIONS
from tests.faults.situations.place import CannotPlay, Place, Situation
from tests.processes import Warm
from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import in_markdown
from vlm_sft.common.console import say

RECORD = RESULTS / "situations.json"
PAGE = ROOT / "docs" / "RELIABILITY.md"


def main() -> int:
    """Play what was asked for, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="situations; all when none is named")
    args = parser.parse_args()
    known = {one.name: one for one in SITUATIONS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    failed = []
    warm = Warm()
    try:
        with tempfile.TemporaryDirectory(prefix="vlm_sft_situations") as name:
            for one in [known[name] for name in args.names or known]:
                row = play(one, Path(name), warm)
                failed += [] if row["held"] else [one.name]
                # Read anew each time: another call may play others meanwhile.
                found = (_read()["situations"] if RECORD.is_file() else {}) | {one.name: row}
                record = {"situations": {name: found[name] for name in known if name in found}} | origin()
                artifacts.write_json(RECORD, record)
    finally:
        warm.close()
    page = with_block(PAGE.read_text(encoding="utf-8"), "situations", table(_read()))
    artifacts.write_text_atomic(PAGE, page)
    say(f"record: {RECORD}\ntable: {PAGE}")
    return 1 if failed else 0


def _read() -> dict[str, Any]:
    """The record."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def play(one: Situation, folder: Path, warm: Warm) -> dict[str, Any]:
    """Play one situation; returns its row of the record."""
    held = True
    try:
        outcome = one.play(Place(folder / one.name, warm, folder / "shared"))
    except CannotPlay as reason:
        outcome = f"not played here: {reason}"
    except AssertionError as error:
        held, outcome = False, f"did not hold: {str(error)[-300:]}"
    outcome = outcome.replace(str(folder / one.name), "…").replace(str(folder), "…")
    say(f"{one.name}: {outcome}")
    return {"kind": one.kind, "what": one.what, "outcome": outcome, "held": held}


def table(record: dict[str, Any]) -> str:
    """The tables of the page, one a kind."""
    rows = record["situations"].values()
    held = sum(row["held"] for row in rows)
    last = f"commit {commit(record)}, the last on {record['made'][:10]}"
    lines = [f"{len(rows)} situations, of which {held} hold; {last}."]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines += ["", f"| {kind} | what comes of it |", "|---|---|"]
        own = [row for row in rows if row["kind"] == kind]
        lines += [f"| {in_markdown(row['what'])} | {in_markdown(row['outcome'])} |" for row in own]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""`vlm-sft data cache list|clear`: what prepared data takes on disk."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

HELP = "list or clear the prepared data that is cached between runs"


def add_cache_arguments(actions: Any) -> None:
    """Add `data cache` with its own actions to the actions of `data`."""
    cache = actions.add_parser("cache", help=HELP, description=HELP)
    verbs = cache.add_subparsers(dest="cache_action", required=True, metavar="ACTION")
    shown = verbs.add_parser("list", help="the cached data, its size and last use")
    clear = verbs.add_parser("clear", help="remove entries")
    clear.add_argument("--older_than", type=float, metavar="DAYS", help="entries not used for this many days")
    clear.add_argument("--all", action="store_true", help="every entry")
    for parser in (shown, clear):
        parser.add_argument(
            "--cache_dir", type=Path, metavar="DIR", help="the cache (default: $VLM_SFT_CACHE, or ~/.cache/vlm_sft)"
        )


def run_cache(args: argparse.Namespace) -> int:
    """List or clear.

    Raises:
        RunError: clear was given neither or both of its flags, a negative age, or an entry cannot be removed.
    """
    from vlm_sft.common.console import say
    from vlm_sft.common.errors import RunError
    from vlm_sft.data.cache.directory import clear_entries, default_cache_dir, list_entries

    root = args.cache_dir or default_cache_dir()
    if args.cache_action == "list":
        entries = list_entries(root)
        for entry in entries:
            used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
            say(f"{entry.kind:<9} {entry.bytes / 1e6:>10,.1f} MB  last used {used}  {entry.what}  {entry.folder.name}")
        total = sum(entry.bytes for entry in entries)
        say(f"{len(entries)} entries, {total / 1e6:,.1f} MB in {root}")
        return 0
    if args.all == (args.older_than is not None):
        raise RunError("data cache clear: say what to remove", "pass --older_than DAYS or --all")
    if args.older_than is not None and not args.older_than >= 0:
        raise RunError(f"--older_than {args.older_than} is not a number of days", "pass 0 or more")
    count, size = clear_entries(root, args.older_than)
    say(f"removed {count} entries, {size / 1e6:,.1f} MB, from {root}")
    return 0

"""`vlm-sft report`: runs as one HTML file, as files for papers, or as a page that follows a training."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Render run folders as one HTML file that opens anywhere, as figures and tables, or as a page that follows them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="output folder of a training run, or a folder of such"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the file to write (default: report.html in the run folder, or here for several runs)",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="write the figures (SVG, PNG) and tables (CSV, Markdown) into this folder, for a paper",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page on 127.0.0.1 instead of writing it; it refreshes while the runs continue",
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="port for --watch; 0: any free one (default: 8686, or the next that is free)",
    )


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself where it is a run's, or those of the runs in it, which are named."""
    from vlm_sft.common import artifacts
    from vlm_sft.common.console import say

    if (folder / artifacts.RUN).exists() or not folder.is_dir():
        return [folder]
    runs = sorted(place.parent for place in folder.glob(f"*/{artifacts.RUN}"))
    if not runs:
        return [folder]
    say(f"{len(runs)} runs in {folder}: {', '.join(run.name for run in runs)}")
    return runs


def run(args: argparse.Namespace) -> int:
    """Write the report, or serve it, and say where it is."""
    from vlm_sft.common import artifacts
    from vlm_sft.common.console import say
    from vlm_sft.common.errors import RunError
    from vlm_sft.common.formats import size
    from vlm_sft.report.export import export
    from vlm_sft.report.html import write_report
    from vlm_sft.report.serve import watch

    if args.watch and (args.output or args.export):
        raise RunError("--watch writes no file", "leave out --output and --export, or --watch")
    if args.port is not None and not args.watch:
        raise RunError("--port is only for --watch", "add --watch")
    args.runs = [run for folder in args.runs for run in _runs_in(folder)]
    if args.watch:
        watch(args.runs, args.port)
        return 0
    if args.export:
        files = export(args.runs, args.export)
        say(f"wrote {len(files)} figures and tables to {args.export}: " + ", ".join(path.name for path in files))
        if not args.output:
            return 0
    default = args.runs[0] / artifacts.REPORT if len(args.runs) == 1 else Path(artifacts.REPORT)
    output = write_report(args.runs, args.output or default)
    say(f"wrote {output} ({size(output.stat().st_size)}); open it in a browser")
    return 0

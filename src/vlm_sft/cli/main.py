"""The command line: finds the verb, runs it, and turns a user's mistake into one message."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from vlm_sft.cli.parser import build_parser
from vlm_sft.common.console import lost_streams, secure_streams
from vlm_sft.common.errors import InterruptedRunError, VlmSftError, quoted
from vlm_sft.common.hub_answers import forget_answers

# Verbs that leave nothing but what they print: without their reader they have not done what they were asked for.
PRINTING = ("plan", "recommend", "score", "ask", "completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments without the program name; the process's own by default.

    Returns:
        The exit code: 0 when all went well, 2 for a mistake that the user can correct, 75 for a training that a
        signal stopped and that can be started again, 130 when interrupted otherwise. Of a verb that only prints, and
        whose output was lost: 141 where nobody reads it any more (as `head` leaves others), else 1.
    """
    secure_streams()
    forget_answers()
    argv = _launcher_flag_last(list(sys.argv[1:] if argv is None else argv)) or ["--help"]
    verb = next((word for word in argv if not word.startswith("-")), "")
    try:
        args = build_parser(verb).parse_args(argv)
    except SystemExit as end:  # --help and --version end here too
        raise SystemExit(end.code or _printed()) from None
    # It warns of a missing kernel whenever peft imports it, also where nothing is in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = int(importlib.import_module(f"vlm_sft.cli.{args.verb}").run(args))
        return code or (_printed() if args.verb in PRINTING else 0)
    except (VlmSftError, InterruptedRunError) as error:
        if not isinstance(error, InterruptedRunError) or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{error.label}: {error}\n")
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        sys.stderr.write(f"error: a path is too long to be one: {quoted(os.fspath(error.filename or ''))}\n")
        return VlmSftError.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _printed() -> int:
    """The exit code of what was only to be printed: 0 when standard output took it."""
    error = lost_streams().get("stdout")
    if error is None:
        return 0
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    sys.stderr.write(f"error: standard output: {error.strerror}\n")
    return 1


def _launcher_flag_last(argv: list[str]) -> list[str]:
    """`deepspeed --module vlm_sft VERB …` puts its flag before the verb, whose flag it is."""
    leading = [word for word in argv[:1] if word.startswith("--local_rank=")]
    return argv[len(leading) :] + leading


if __name__ == "__main__":
    sys.exit(main())

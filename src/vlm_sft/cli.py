"""The command line: finds the verb, runs it, and turns a user's mistake into one message. Imports nothing heavy."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from vlm_sft.commands.parser import build_parser
from vlm_sft.errors import InterruptedRunError, VlmSftError, quoted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments without the program name; the process's own by default.

    Returns:
        The exit code: 0 when all went well, 2 for a mistake that the user can correct, 75 for a training that a
        signal stopped and that can be started again, 130 when interrupted otherwise.
    """
    argv = _launcher_flag_last(list(sys.argv[1:] if argv is None else argv))
    verb = next((word for word in argv if not word.startswith("-")), "")
    args = build_parser(verb).parse_args(argv)
    # It warns of a missing kernel whenever peft imports it, also where nothing is in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return int(importlib.import_module(f"vlm_sft.commands.{args.verb}").run(args))
    except VlmSftError as error:
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


def _launcher_flag_last(argv: list[str]) -> list[str]:
    """`deepspeed --module vlm_sft VERB …` puts its flag before the verb, whose flag it is."""
    leading = [word for word in argv[:1] if word.startswith("--local_rank=")]
    return argv[len(leading) :] + leading


if __name__ == "__main__":
    sys.exit(main())

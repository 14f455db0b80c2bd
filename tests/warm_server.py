"""A process that imports the libraries once and forks a run for each line of its input."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import vlm_sft.train.run  # noqa: F401  what takes seconds to import
from tests.processes import measure_briefly
from vlm_sft.data.demo.generate import KINDS, demo_samples

RUNNING: set[int] = set()


def child(order: dict[str, Any]) -> None:
    """Become the launch line's script; does not return."""
    os.setsid()
    os.chdir(order["folder"])
    for number, path in ((1, order["log"]), (2, order["errors"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    for name in order["without"]:
        os.environ.pop(name, None)
    os.environ.update(order["more"])
    encoding, _, handling = order["more"].get("PYTHONIOENCODING", "").partition(":")
    for printed in (sys.stdout, sys.stderr) if encoding else ():  # an interpreter reads it when it starts
        printed.reconfigure(encoding=encoding, errors=handling or None)
    sys.argv = [order["script"], *order["flags"]]
    code = 1
    try:
        for name, value in order["settings"].items():
            module, _, constant = name.partition(":")
            getattr(sys.modules[module], constant)  # a setting of nothing would change nothing
            setattr(sys.modules[module], constant, value)
        runpy.run_path(order["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def reap(pid: int, path: Path) -> None:
    """Wait for a run and write down how it ended, its peak memory in KiB, and its CPU seconds."""
    _, status, used = os.wait4(pid, 0)
    RUNNING.discard(pid)
    path.with_suffix(".writing").write_text(
        f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss} {used.ru_utime + used.ru_stime:.2f}"
    )
    os.replace(path.with_suffix(".writing"), path)


def main() -> None:
    """Serve until the input ends."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    measure_briefly()
    for kind in KINDS:  # what most runs ask for
        demo_samples(kind, "validation", 300)
        demo_samples(kind, "test", 1000)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, wherever the tests were started
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(order)
        RUNNING.add(pid)
        threading.Thread(target=reap, args=(pid, Path(f"{order['log']}.{pid}.exit"))).start()
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    for pid in set(RUNNING):  # whoever asked for them has ended, or a test failed before it ended its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

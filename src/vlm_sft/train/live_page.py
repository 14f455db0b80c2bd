"""The live page of a training: served by a process of its own, so that drawing it takes no time of the training's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_sft.common.console import is_main_process, say
from vlm_sft.report.serve import ADDRESS, LINGER_SECONDS, listen

GRACE_SECONDS = 5.0  # for a page that is being drawn when the run ends


@contextmanager
def live_page(folder: Path, wanted: bool) -> Iterator[None]:
    """Serve the live page of a run while the block runs, on rank 0, and say where.

    The process that serves ends with this one, however that ends: it waits for the other end of a pipe.

    Args:
        folder: the run's folder; run.json may come later.
        wanted: False serves nothing.
    """
    if not wanted or not is_main_process():
        yield
        return
    with listen() as listening:
        port = listening.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "vlm_sft.report.serve", str(folder.resolve()), str(listening.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C is for the training
        )
    say(f"live page: http://{ADDRESS}:{port}/ in a browser of this machine, until the run ends")
    try:
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell the server that the run is over; it goes when an open page has the last state."""
    try:
        process.communicate(b"\n", timeout=LINGER_SECONDS + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

"""What a run records about itself: run.json and data.json. Standard library and torch for the memory figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vlm_sft import __version__
from vlm_sft.common import artifacts
from vlm_sft.common.console import STREAMS, is_main_process, lost_streams, warn
from vlm_sft.common.errors import RunError, without_secrets

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "datasets",
    "numpy",
    "triton",
    "liger-kernel",
)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    installed = {name: version_of(name) for name in PACKAGES}
    found = {name: version for name, version in installed.items() if version is not None}
    return {"vlm-sft": __version__, "python": platform.python_version()} | found


@cache
def version_of(package: str) -> str | None:
    """The version of an installed package, read from its files once; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Hash and dirty flag of the checkout that the code runs from; nulls outside one.

    Args:
        left_out: paths from its root whose changes do not count, such as what a benchmark has just written.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--", ":/", *(f":/!{path}" for path in left_out))
    return {"hash": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def command_line() -> list[str]:
    """The words of this process's command line, without secrets: records are shared."""
    return [without_secrets(word) for word in sys.argv]


def device_name() -> str:
    """The device that computes, as its maker calls it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"CPU ({model}, {torch.get_num_threads()} threads)"


def bfloat16_flags() -> tuple[str, ...]:
    """The instructions of this processor that multiply bfloat16; () where it has none or does not say.

    ONEDNN_MAX_CPU_ISA, which keeps oneDNN from using them (e.g. AVX512_CORE), counts as a processor without them.
    """
    info = Path("/proc/cpuinfo")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    limited = limit not in ("DEFAULT", "ALL") and not any(word in limit for word in ("BF16", "FP16", "AMX", "AVX10"))
    if limited or not info.is_file():
        return ()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)


def loaded_in_bfloat16(record: Mapping[str, Any]) -> bool:
    """Whether a run loaded its weights in bfloat16, whatever it computed in then, from its run.json."""
    return bool(record.get("loaded_dtype", record.get("dtype")) == "bfloat16")


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the allocator on a GPU, resident set on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Not ru_maxrss: on Linux that begins with what the process was before exec, a copy of its launcher.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return _most_resident_bytes()


def memory_bytes() -> int:
    """Memory that this process may have, itself included: of the GPU, else of the machine or its container."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return total


def resident_bytes() -> int:
    """Memory of this process now, resident; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return _most_resident_bytes()
    return pages * resource.getpagesize()


def _most_resident_bytes() -> int:
    """The largest resident set as getrusage counts it: in bytes on macOS, in KiB elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def folder_bytes(paths: list[Path]) -> int:
    """Bytes of all files below the paths."""
    total = 0
    for path in paths:
        files = [path] if path.is_file() else path.rglob("*")
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


class RunRecord:
    """run.json, kept up to date while the run goes on, from the first `write` on; only rank 0 writes.

    Args:
        folder: the run's folder.
        facts: what is known at the start: base model, data sets, ….
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path = folder / artifacts.RUN
        self._began = time.monotonic()
        self._stages: dict[str, float] = {}  # when those that are under way began
        self._warned = False
        self.values: dict[str, Any] = {
            "schema": 1,
            "status": "running",
            "command": command_line(),
            "started": now(),
            "finished": None,
            "wall_seconds": 0.0,
            "seconds": {},
            **facts,
            "versions": versions(),
            "git": git_state(),
            "notes": [],
        }

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall seconds of a stage, however it ends; a state that is written meanwhile has those so far."""
        self._stages[name] = time.monotonic()
        try:
            yield
        finally:
            self._count_stages()
            del self._stages[name]
            self.write()

    def _count_stages(self) -> None:
        """Add what has passed since the last count to the stages that are under way."""
        seconds, time_ = self.values["seconds"], time.monotonic()
        for name, began in self._stages.items():
            seconds[name] = round(seconds.get(name, 0.0) + time_ - began, 3)
            self._stages[name] = time_

    def update(self, **facts: Any) -> None:
        """Add facts."""
        self.values.update(facts)
        self.write()

    def note(self, text: str) -> None:
        """Add a note for the reader."""
        self.values["notes"].append(text)

    def finish(self, status: str) -> None:
        """Write the last state: "finished", "failed" or "interrupted"."""
        self.update(status=status, finished=now(), peak_memory_bytes=peak_memory_bytes())

    def write(self) -> None:
        """Write the file."""
        self.values["wall_seconds"] = round(time.monotonic() - self._began, 3)
        self._count_stages()
        if not is_main_process():
            return
        self._note_lost_streams()
        try:
            artifacts.write_json(self.path, self.values)
        except RunError as error:
            # A full disk ends no training that could go on.
            if not self._warned:
                warn(f"{error.what}; {self.path.name} stays out of date until then")
            self._warned = True

    def _note_lost_streams(self) -> None:
        """Note once that a standard stream does not take what is said any more: nothing else tells of it."""
        for name, error in lost_streams().items():
            note = f"{STREAMS[name]} was lost ({error.strerror}): not all that was said could be shown"
            if note not in self.values["notes"]:
                self.note(note)
                warn(note)


def now() -> str:
    """The present moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")

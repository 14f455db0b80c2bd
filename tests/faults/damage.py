"""One changed or missing byte in every kind of file that is read back, and full or read-only disks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.harness import Reference, Tally, arguments, check_folder
from tests.faults.injection import EVER, Fault, Injected
from tests.processes import SCRIPT, Started, Warm, start
from vlm_sft.common.errors import ModelError
from vlm_sft.common.manifest import folder_problems
from vlm_sft.data.cache.directory import ENTRY
from vlm_sft.data.cache.store import Store
from vlm_sft.model.adapters import load_adapter
from vlm_sft.train.checkpoint.directory import checkpoint_problems, checkpoints


@contextmanager
def damaged(path: Path, rng: random.Random, cut: bool) -> Iterator[None]:
    """Flip one bit of one byte, or cut the file off, while the block runs."""
    original = path.read_bytes()
    changed = bytearray(original)
    if cut:
        del changed[rng.randrange(len(original)) :]
    else:
        changed[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(original)


def detectors(output: Path, cache: Path) -> Iterator[tuple[str, Path, Callable[[], bool]]]:
    """Every file that is read back, its kind, and what looks whether it is damaged."""
    for folder in checkpoints(output):
        for path in sorted(folder.iterdir()):
            yield f"checkpoint: {path.name}", path, lambda folder=folder: bool(checkpoint_problems(folder))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        yield f"adapter: {name}", output / name, lambda: _refused(output)
    for name in ("prompt.json", "manifest.json", "manifest.sha256"):
        yield f"adapter: {name}", output / name, lambda name=name: bool(folder_problems(output, ["prompt.json"]))
    for path in sorted(cache.glob("*/*/*.safetensors")):
        index = path.with_suffix(".json")
        keys = list(json.loads(index.read_text())["records"])
        for file in (path, index):
            kind = f"cache: {path.parent.parent.name}{file.suffix}"
            yield kind, file, lambda path=path, keys=keys: _not_opened(path, keys)


def _refused(output: Path) -> bool:
    """Whether the adapter is refused before anything is read into a model."""
    try:
        load_adapter(None, output)
    except ModelError as error:
        return "manifest" in str(error) or "checksum" in str(error) or "bytes instead of" in str(error)
    except AttributeError:  # it went on to the model, and there is none
        return False
    return False


def _not_opened(path: Path, keys: list[str]) -> bool:
    """Whether a cache finds its shard damaged; it removes what is, so both files are put back afterwards."""
    index = path.with_suffix(".json")
    kept = {file: file.read_bytes() for file in (path, index)}
    store = Store(path.parent)
    store.open(keys)
    found = [store.get(key) is not None for key in keys]
    for file, data in kept.items():
        file.write_bytes(data)
    return not all(found)


def damage_everything(output: Path, cache: Path, flips: int, cuts: int, rng: random.Random) -> dict[str, list[int]]:
    """Damage every file several times; returns by kind how often, and how often it was seen."""
    counts: dict[str, list[int]] = {}
    for kind, path, seen in list(detectors(output, cache)):
        if path.name == ENTRY or not path.stat().st_size:
            continue
        for number in range(flips + cuts):
            with damaged(path, rng, cut=number >= flips):
                found = seen()
            count = counts.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += found
    return counts


FAULTS = ("full, stop", "full, continue", "full for a while", "not writable")


def unprivileged(flags: list[str]) -> list[str]:
    """The launch line without root's right to write where the mode of a folder forbids it."""
    command = [sys.executable, str(SCRIPT), *flags]
    if os.geteuid() != 0:
        return command
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own on a folder; needs the right to mount.

    Raises:
        PermissionError: it cannot be mounted.
    """
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free_bytes: int) -> Path:
    """Fill a file system up to a number of bytes."""
    path = folder / "filler"
    disk = os.statvfs(folder)
    with path.open("wb") as stream:
        with contextlib.suppress(OSError):  # the run writes too: then there is less room than asked for
            stream.write(b"\0" * max(0, disk.f_bavail * disk.f_frsize - free_bytes))
            stream.flush()
    return path


def starve(
    begin: Callable[[list[str], Path], Started],
    place: Path,
    reference: Reference,
    fault: str,
    folder: Path,
    tally: Tally,
    rng: random.Random,
) -> None:
    """Take the disk away from a run after its first checkpoint, give it back, resume, and compare.

    Args:
        begin: starts a run.
        place: model and data.
        reference: of an uninterrupted run.
        fault: one of `FAULTS`.
        folder: for this run.
        tally: counts; `kills` by fault and outcome.
        rng: draws the moment and the room that is left.
    """
    disk, log = folder / "disk", folder / "log"
    with small_disk(disk, 16):
        output = disk / "run"
        flags = arguments(place, output, "--on_save_error", "stop" if fault.endswith("stop") else "continue")
        run = start(unprivileged(flags), log) if fault == "not writable" else begin(flags, log)
        while not checkpoints(output) and run.wait(0.005) is None:
            pass
        run.wait(rng.random() * 0.5)
        filler = None
        if fault == "not writable":
            output.chmod(0o555)
        else:
            filler = fill(disk, rng.randrange(200_000))
        if fault == "full for a while":
            while "cannot be written" not in log.read_text() and run.wait(0.005) is None:
                pass
            filler.unlink()
        code = run.wait(120)
        check_folder(output, tally, 0)
        told = log.read_text()
        if "Traceback" in told or (code and "error: " not in told) or (code == 0 and "cannot be written" not in told):
            tally.trouble.append(f"{fault}: exit {code}: {told[-1500:]}")
        tally.count(f"{fault}: exit {code}")
        output.chmod(0o755)
        if filler is not None:
            filler.unlink(missing_ok=True)
        _resume(begin, flags, log, output, reference, fault, tally)


def _resume(
    begin: Callable[[list[str], Path], Started],
    flags: list[str],
    log: Path,
    output: Path,
    reference: Reference,
    fault: str,
    tally: Tally,
) -> None:
    """Go on with a sound disk, and compare."""
    code = begin(flags, log).wait(120)
    if code != 0:
        tally.trouble.append(f"{fault}: resumed with exit {code}: {log.read_text()[-1500:]}")
        return
    tally.compare(reference, output, f"{fault}, after the resume")


def strike(
    warm: Warm, place: Path, reference: Reference, policy: str, folder: Path, tally: Tally, rng: random.Random
) -> None:
    """Let calls of a run on its own folder fail with EIO, for once or from then on; resume, and compare.

    Args:
        warm: starts runs below the layer that injects the errors.
        place: model and data.
        reference: of an uninterrupted run.
        policy: of `--on_save_error`.
        folder: for this run.
        tally: counts; `kills` by the call that failed and the outcome.
        rng: draws the call, and when it begins and ceases to fail.
    """
    output, log = folder / "run", folder / "log"
    call = rng.choice(("write", "fsync", "rename"))
    fault = Fault(call, f"{output}*", first=rng.randint(1, 30), count=rng.choice((1, 3, EVER)))
    faults = Injected(folder / "faults", fault)
    flags = arguments(place, output, "--on_save_error", policy)
    code = warm.start(flags, log, faults.variables).wait(120)
    check_folder(output, tally, 0)
    told, struck = log.read_text(), faults.met[0] >= fault.first
    name = f"EIO in {call}, {policy}" if struck else f"EIO in {call}, too late to strike"
    silent = (struck and "Input/output" not in told) or (code and "error: " not in told)
    if silent or code is None or "Traceback" in told:
        tally.trouble.append(f"{fault}: exit {code}: {told[-1500:]}")
    tally.count(f"{name}: exit {code}")
    _resume(warm.start, flags, log, output, reference, name, tally)

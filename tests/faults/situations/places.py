"""Awkward places: caches and output folders that fail, few descriptors, no HOME, moved and copied runs, clocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from safetensors.numpy import load_file

from tests.faults.situations.place import CannotPlay, Place, Stage
from tests.wording import line_with

situation = Stage("places")
YEAR = 365 * 86_400


def weights(run: Path) -> dict[str, bytes]:
    """The adapter of a run, bit for bit."""
    return {name: value.tobytes() for name, value in load_file(run / "adapter_model.safetensors").items()}


def status(run: Path) -> str:
    """What run.json says."""
    return str(json.loads((run / "run.json").read_text())["status"])


def _without_cache(place: Place, cache: Path, **how: object) -> str:
    """A training whose cache cannot be written is the one with a sound cache."""
    data, run, sound = place.data(), place.folder / "run", place.folder / "sound"
    told = place.cold(*place.train(data, run, "--cache_dir", cache), **how)  # type: ignore[arg-type]
    place.run(*place.train(data, sound))
    assert status(run) == "finished" and weights(run) == weights(sound)
    return line_with(told, "prepared data cannot be stored").replace(str(place.folder), "…")


@situation("the cache folder is a file; the output folder is sound")
def cache_is_a_file(place: Place) -> str:
    (place.folder / "cache").write_text("")
    return _without_cache(place, place.folder / "cache")


@situation("the cache folder cannot be made (below /proc)")
def cache_read_only(place: Place) -> str:
    return _without_cache(place, Path("/proc/vlm_sft"))


@situation(
    "the cache on a disk of its own that is full (a tmpfs of 64 KiB), and one that is read-only; outputs elsewhere"
)
def cache_disk_full_or_read_only(place: Place) -> str:
    cache = place.folder / "cache"
    cache.mkdir()
    told = []
    for name, options in (("full", "size=64k"), ("read_only", "size=9m,ro")):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", cache], capture_output=True)
        if mounted.returncode:
            raise CannotPlay("needs the right to mount")
        try:
            told.append(place.run(*place.train(place.data(), place.folder / name, "--cache_dir", cache)))
        finally:
            subprocess.run(["umount", "-l", cache], check=True)
    place.run(*place.train(place.data(), place.folder / "sound"))
    sound = weights(place.folder / "sound")
    assert weights(place.folder / "full") == weights(place.folder / "read_only") == sound
    lines = [line_with(text, "warning:", "cache") for text in told]
    return f"the same adapter; full: {lines[0]}; read-only: {lines[1]}".replace(str(place.folder), "…")


@situation("two trainings at once on one empty cache")
def two_on_one_cache(place: Place) -> str:
    data, cache = place.data(), place.folder / "cache"
    other = Place(place.folder / "other", place.warm, place.shared)
    started = [one.start(*one.train(data, one.folder / "run", "--cache_dir", cache)) for one in (place, other)]
    assert [one.wait(500) for one in started] == [0, 0], (place.folder / "log").read_text()
    place.run(*place.train(data, place.folder / "alone", "--cache_dir", place.folder / "cache2"))
    assert weights(place.folder / "run") == weights(other.folder / "run") == weights(place.folder / "alone")
    return "both finish with the adapter of a run alone, bit for bit"


@situation("`data cache clear --all` again and again while a training runs on that cache")
def cache_cleared_meanwhile(place: Place) -> str:
    data, cache, other = place.data(), place.folder / "cache", Place(place.folder / "other", place.warm, place.shared)
    run = place.start(*place.train(data, place.folder / "run", "--cache_dir", cache, "--max_steps", "12"))
    cleared = 0
    while run.wait(0.01) is None:
        other.run("data", "cache", "clear", "--all", "--cache_dir", cache)
        cleared += 1
    text = (place.folder / "log").read_text()
    assert run.wait(1) == 0 and "Traceback" not in text, text[-2000:]
    place.run(*place.train(data, place.folder / "alone", "--max_steps", "12", "--cache_dir", place.folder / "cache2"))
    assert weights(place.folder / "run") == weights(place.folder / "alone")
    return f"{cleared} times; the run finishes with the same adapter"


@situation("a link that leads away within the cache, and files of others in it; data cache clear --all")
def cache_with_links(place: Place) -> str:
    cache, precious = place.folder / "cache", place.folder / "precious"
    precious.mkdir()
    (precious / "entry.json").write_text("{}")
    (precious / "mine.txt").write_text("mine")
    (cache / "images").mkdir(parents=True)
    (cache / "images" / "link").symlink_to(precious)
    (cache / "images" / "note.txt").write_text("mine")
    told = place.run("data", "cache", "clear", "--all", "--cache_dir", cache)
    assert (precious / "mine.txt").read_text() == "mine" and (cache / "images" / "note.txt").is_file(), told
    return line_with(told, "removed")


@situation(
    "output folders with spaces, a line end, quotes, an emoji and a dash in front; train, eval, report, export, resume"
)
def odd_output_names(place: Place) -> str:
    data = place.data()
    for name in ("a b 'c' \"d\"", "line\nend", "🦉 ünï", "-dash"):
        run = place.folder / name
        place.run(*place.train(data, run))
        place.run(*place.train(data, run, "--resume"))
        place.run("report", run)
        place.evaluate(run, data, place.folder / f"{name} eval")
        place.run("export", "--adapter", run, "--output_dir", place.folder / f"{name} out")
    return "4 names go through all five"


@situation("TMPDIR names a folder that is not there")
def no_temporary_folder(place: Place) -> str:
    place.cold(*place.train(place.data(), place.folder / "run"), TMPDIR="/nowhere")
    return f"the run is {status(place.folder / 'run')}"


@situation("HOME is not set, and HOME names a folder that cannot be made")
def no_home(place: Place) -> str:
    data = place.data()
    gone = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "VLM_SFT_CACHE")
    place.cold(*place.train(data, place.folder / "run"), env=gone, VLM_SFT_CACHE="")
    told = place.cold(*place.train(data, place.folder / "run2"), HOME="/proc/nobody", VLM_SFT_CACHE="")
    assert status(place.folder / "run") == status(place.folder / "run2") == "finished"
    return f"both runs finish; the second: {line_with(told, 'prepared data cannot be stored')}"


@situation("the C locale, with and without Python's UTF-8 mode; names and texts with umlauts, CJK and emoji")
def c_locale(place: Place) -> str:
    data, run = place.data("größe 象", question="Wie groß? 象 🦉"), place.folder / "läuf"
    more = {"LC_ALL": "C", "LANG": "C"}
    place.cold(*place.train(data, run), env=("PYTHONUTF8",), **more)
    ascii_only = more | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    place.cold("data", "export", data, "--format", "csv", "--output", place.folder / "out", **ascii_only)
    assert "Wie groß? 象 🦉" in (place.folder / "out" / "train.csv").read_text(encoding="utf-8")
    told = place.cold(*place.train(data, place.folder / "läuf2"), code=2, **ascii_only)
    return f"as elsewhere; without that mode, where a library would fail: {line_with(told, 'error:')}"


@situation("umask 077, and umask 022")
def umask_of_the_user(place: Place) -> str:
    data = place.data()
    modes = {}
    for umask in ("077", "022"):
        run = place.folder / umask
        place.cold(*place.train(data, run, "--cache_dir", place.folder / f"cache{umask}"), before=f"umask {umask}")
        paths = [path for top in (run, place.folder / f"cache{umask}") for path in top.rglob("*") if path.is_file()]
        modes[umask] = {path.name: oct(path.stat().st_mode & 0o777)[2:] for path in paths}
    assert set(modes["077"].values()) == {"600"}, {k: v for k, v in modes["077"].items() if v != "600"}
    assert set(modes["022"].values()) == {"644"}, {k: v for k, v in modes["022"].items() if v != "644"}
    return f"{len(modes['077'])} files have mode 600, and 644"


@situation("at most 64 open files (ulimit -n 64)")
def few_descriptors(place: Place) -> str:
    data = place.data()
    words = place.train(data, place.folder / "run", "--eval_benchmarks", data, "--dataloader_num_workers", "2")
    place.cold(*words, before="ulimit -n 64")
    place.cold("report", place.folder / "run", before="ulimit -n 64")
    assert status(place.folder / "run") == "finished"
    return "training with two workers, evaluation and report finish"


@situation("no file above 256 KiB (RLIMIT_FSIZE, as a quota): the adapter does not fit")
def file_size_limit(place: Place) -> str:
    told = place.cold(*place.train(place.data(), place.folder / "run"), before="ulimit -f 512", code=2)
    assert status(place.folder / "run") == "failed" or not (place.folder / "run" / "run.json").exists()
    return line_with(told, "error:").replace(str(place.folder), "…")


@situation("a lock that a dead process left, with the id of a process that lives now")
def lock_of_the_dead(place: Place) -> str:
    data, run = place.data(), place.folder / "run"
    run.mkdir()
    (run / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": "here", "command": ["train"]}))
    place.run(*place.train(data, run))
    return "the run takes the folder"


@situation(
    "leftovers of killed runs: checkpoint-2.partial, checkpoint-4.removed, a link to nowhere, .tmp files; resume"
)
def leftovers(place: Place) -> str:
    data, run = place.data(), place.folder / "run"
    place.stop_after_two(data, run)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3.partial")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1.removed")
    (run / "checkpoint-9").symlink_to("/nowhere")
    (run / ".run.json.abc.tmp").write_text("")
    told = place.run(*place.train(data, run, "--resume", "auto"))
    assert not (run / "checkpoint-3.partial").exists() and not (run / "checkpoint-1.removed").exists()
    place.run(*place.train(data, place.folder / "alone"))
    assert weights(run) == weights(place.folder / "alone")
    return line_with(told, "checkpoint-2").replace(str(place.folder), "…")


@situation("a run folder moved, and copied, between stop and resume; then eval, report and export of both")
def moved_run(place: Place) -> str:
    data, run, moved, copy = place.data(), place.folder / "run", place.folder / "m" / "moved", place.folder / "copy"
    place.stop_after_two(data, run)
    place.run(*place.train(data, place.folder / "alone"))
    expected = weights(place.folder / "alone")
    shutil.copytree(run, copy)
    moved.parent.mkdir()
    shutil.move(run, moved)
    for folder in (moved, copy):
        told = place.run(*place.train(data, folder, "--resume", "auto"))
        line_with(told, "checkpoint-2")
        assert weights(folder) == expected
        place.evaluate(folder, data, folder.parent / f"{folder.name}-eval")
        place.run("report", folder)
        place.run(
            "export",
            "--adapter",
            folder,
            "--merge",
            "--dtype",
            "float32",
            "--questions",
            "1",
            "--output_dir",
            folder.parent / f"{folder.name}-out",
        )
    return "both go on to the same adapter, bit for bit, and everything opens them"


@situation("data moved to another folder between stop and resume")
def moved_data(place: Place) -> str:
    data, run = place.data(), place.folder / "run"
    place.stop_after_two(data, run)
    shutil.move(data, place.folder / "elsewhere")
    (place.folder / "elsewhere").rename(place.folder / "new")
    told = place.run(*place.train(data, run, "--resume", "auto"), code=2)
    again = place.start(*place.train(place.folder / "new", run, "--resume", "auto")).wait(500)
    text = (place.folder / "log").read_text()
    assert again in (0, 2) and "Traceback" not in text
    last = "goes on" if again == 0 else line_with(text, "error:")
    return f"the old path: {line_with(told, 'error:')}; the new one: {last}".replace(str(place.folder), "…")


@situation("stopped for two days and continued; the cache swept and cleared in between")
def stopped_for_days(place: Place) -> str:
    data, run, cache = place.data(), place.folder / "run", place.folder / "cache"
    place.run(*place.train(data, run, "--cache_dir", cache))
    expected = weights(run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "adapter_model.safetensors").unlink()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"started": "2020-01-01T00:00:00+00:00", "status": "interrupted"}))
    for path in (*run.rglob("*"), *cache.rglob("*"), *data.rglob("*")):
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    place.run("data", "cache", "clear", "--older_than", "1", "--cache_dir", cache)
    place.run(*place.train(data, run, "--cache_dir", cache, "--resume", "auto"))
    assert weights(run) == expected
    wall = json.loads((run / "run.json").read_text())["wall_seconds"]
    assert 0 < wall < 600
    return f"the same adapter; the pause is not counted (wall_seconds {wall})"


@situation(
    "a clock that was set back: every file of run, data and cache is ten years in the future; resume, report, eval"
)
def files_of_the_future(place: Place) -> str:
    data, run, cache = place.data(), place.folder / "run", place.folder / "cache"
    place.stop_after_two(data, run, "--cache_dir", cache)
    for path in (*run.rglob("*"), *cache.rglob("*"), *data.rglob("*")):
        os.utime(path, (time.time() + 10 * YEAR,) * 2)
    place.run(*place.train(data, run, "--cache_dir", cache, "--resume", "auto"))
    place.run("report", run)
    place.run("data", "cache", "list", "--cache_dir", cache)
    place.run("data", "cache", "clear", "--older_than", "1", "--cache_dir", cache)
    return "nothing is decided by times"


@situation("files older than 1980 and before 1970; train, data check, report, data cache list")
def files_of_the_past(place: Place) -> str:
    data, cache = place.data(), place.folder / "cache"
    for path in data.rglob("*"):
        os.utime(path, (-YEAR, -YEAR))
    place.run(*place.train(data, place.folder / "run", "--cache_dir", cache))
    for path in cache.rglob("*"):
        os.utime(path, (-YEAR, -YEAR))
    place.run("report", place.folder / "run")
    told = place.run("data", "cache", "list", "--cache_dir", cache)
    return line_with(told, "entries")[:40]


@situation("the working folder is removed before the command starts")
def no_working_folder(place: Place) -> str:
    gone = place.folder / "gone"
    gone.mkdir()
    told = place.cold("data", "check", "demo", "--limit", "5", code=2, before=f"cd '{gone}' && rmdir '{gone}'")
    return line_with(told, "error:")


@situation("the output folder is a link: to a folder, to nowhere, to itself")
def output_is_a_link(place: Place) -> str:
    data, target = place.data(), place.folder / "target"
    target.mkdir()
    for name, to in (("link", target), ("nowhere", place.folder / "no" / "where"), ("loop", place.folder / "loop")):
        (place.folder / name).symlink_to(to)
    place.run(*place.train(data, place.folder / "link"))
    assert (target / "adapter_model.safetensors").is_file()
    told = [place.run(*place.train(data, place.folder / name), code=2) for name in ("nowhere", "loop")]
    return "; ".join(line_with(text, "error:") for text in told).replace(str(place.folder), "…")

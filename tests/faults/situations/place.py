"""What a situation is, and the place where it is played: tiny own data, a finished run, and the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.pictures import COLOURS, png
from tests.processes import MAIN, Started, Warm, environment

SECONDS = 500.0  # for one command


@dataclass(frozen=True)
class Situation:
    """One situation.

    Attributes:
        kind: the heading that it stands under.
        what: what is done, in one line.
        play: does it, asserts what must hold, and returns in one line what came of it.
    """

    kind: str
    what: str
    play: Callable[[Place], str]

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.play.__name__


class CannotPlay(Exception):
    """Why a situation cannot be brought about on this machine."""


class Stage:
    """Collects the situations of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.situations: list[Situation] = []

    def __call__(self, what: str) -> Callable[[Callable[[Place], str]], Callable[[Place], str]]:
        """Add a function as a situation."""

        def add(play: Callable[[Place], str]) -> Callable[[Place], str]:
            self.situations.append(Situation(self.kind, what, play))
            return play

        return add


class Place:
    """A folder of one situation; commands are forked from a warm process.

    Args:
        folder: new.
        warm: forks commands.
        shared: folder of what the situations have in common: the cache, and the finished run.
    """

    def __init__(self, folder: Path, warm: Warm, shared: Path) -> None:
        self.folder, self.warm, self.shared = folder, warm, shared
        self.cache = shared / "cache"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *words: object, **more: str) -> Started:
        """Start a command of ours."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        more = {"VLM_SFT_CACHE": str(self.cache), **more}
        return self.warm.start(list(map(str, words)), log, more, script=MAIN)

    def run(self, *words: object, code: int = 0, **more: str) -> str:
        """Run a command of ours to its end; returns what it printed, which is no traceback."""
        ended = self.start(*words, **more).wait(SECONDS)
        return self._checked((self.folder / "log").read_bytes(), ended, code)

    def cold(self, *words: object, code: int = 0, before: str = "", env: Iterable[str] = (), **more: str) -> str:
        """The same in a process of its own, started by a shell.

        Args:
            words: the command.
            code: exit code that is expected.
            before: what the shell does first, e.g. "ulimit -n 64".
            env: variables that it does not have.
            more: variables that it has.
        """
        variables = {**environment(), "VLM_SFT_CACHE": str(self.cache), **more}
        for name in env:
            variables.pop(name, None)
        line = f'{before or ":"}\nexec "$@"'
        done = subprocess.run(
            ["sh", "-c", line, "sh", sys.executable, "-m", "vlm_sft", *map(str, words)],
            cwd=self.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
        return self._checked(done.stdout, done.returncode, code)

    @staticmethod
    def _checked(printed: bytes, ended: int | None, code: int) -> str:
        text = printed.decode("utf-8", "backslashreplace")
        assert ended == code, f"exit code {ended}, not {code}: {text[-2000:]}"
        assert "Traceback" not in text, text[-2000:]
        return text

    def train(self, data: Path, output: Path, *more: object) -> tuple[object, ...]:
        """Words of a short training of pocket."""
        return (
            "train",
            "--base_model",
            "pocket",
            "--dataset",
            data,
            "--output_dir",
            output,
            "--max_steps",
            "4",
            "--save_steps",
            "2",
            "--global_batch_size",
            "4",
            "--eval_benchmarks",
            "none",
            "--report_to",
            "none",
            "--bf16",
            "false",
            "--logging_steps",
            "1",
            *more,
        )

    def evaluate(
        self, adapter: object, data: object, output: Path, *more: object, code: int = 0, **variables: str
    ) -> str:
        """Evaluate an adapter of pocket on some data; returns as `run` does."""
        return self.run(
            "eval",
            "--base_model",
            "pocket",
            "--adapter",
            adapter,
            "--benchmark",
            data,
            "--output_dir",
            output,
            *more,
            code=code,
            **variables,
        )

    def stop_after_two(self, data: Path, run: Path, *more: object) -> None:
        """Leave a run as one of four steps that was stopped after two."""
        self.run(*self.train(data, run, *more))
        shutil.rmtree(run / "checkpoint-4")
        for name in ("adapter_model.safetensors", "manifest.json", "manifest.sha256"):
            (run / name).unlink()

    def data(self, name: str = "own", rows: list[dict[str, Any]] | None = None, **change: Any) -> Path:
        """A folder with eight pictures and two questions about each; `change` goes into every record."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, colour in enumerate(COLOURS):
            (folder / f"{index}.png").write_bytes(png(colour, (56 + 14 * (index % 3), 70)))
        if rows is None:
            rows = [
                {
                    "image": f"{index}.png",
                    "question": f"What is {number}?",
                    "answer": f"{COLOURS[index]} {number}",
                    "split": ("train", "train", "train", "validation", "test")[index % 5],
                    **change,
                }
                for index in range(len(COLOURS))
                for number in range(2)
            ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder

    @cached_property
    def finished(self) -> Path:
        """A run with predictions and a report on its own data, made once for all."""
        run = self.shared / "finished"
        if not run.is_dir():
            aside = Place(self.shared / "making", self.warm, self.shared)
            data = aside.data()
            aside.run(*aside.train(data, run, "--eval_benchmarks", data))
        return run


def files_with(folder: Path, text: str | bytes) -> list[str]:
    """Names of the files below a folder that hold a text."""
    data = text.encode() if isinstance(text, str) else text
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and data in path.read_bytes()
    ]

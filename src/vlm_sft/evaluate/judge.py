"""A judge that grades answers: a program of the user's, or a model at an address that the user gives."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlm_sft.common import artifacts, console
from vlm_sft.common.errors import EvaluationError, bounded, quoted, without_secrets
from vlm_sft.evaluate.judge_program import OutOfStep, asked_program

HOW_TO_JUDGE = "pass --judge COMMAND, or --judge http://…/v1 --judge_model NAME"
KEYS = ("VLM_SFT_JUDGE_KEY", "OPENAI_API_KEY")  # variables with the key of the address, the first that is set
TRIES = 5  # of one request; in between 1, 2, 4 and 8 seconds, or what the server asks for
READINGS = 2  # requests for one verdict, where the first reply cannot be read
REQUESTS_AT_ONCE = 8
SECONDS = 120.0  # for one reply of a server
LONGEST_WAIT = 60.0  # seconds that a server may ask for
NAMED = 5  # ids of unreadable verdicts in the warning
_SCORE = re.compile(r'\{[^{}]*"score"[^{}]*\}')
_RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Judge:
    """Who grades.

    Attributes:
        place: a command line, or the address of an OpenAI-compatible server (`http://host:8000/v1`).
        model: which model is asked there; None for a command.
    """

    place: str
    model: str | None = None

    @property
    def online(self) -> bool:
        """Whether it is an address."""
        return self.place.lower().startswith(("http://", "https://"))

    def fingerprint(self, prompts: str) -> str:
        """SHA-256 of who grades and by which prompts; scores of different ones are not compared."""
        return hashlib.sha256(json.dumps([without_secrets(self.place), self.model, prompts]).encode()).hexdigest()


def parse_judge(place: str | None, model: str | None) -> Judge | None:
    """Read `--judge` and `--judge_model`.

    Raises:
        EvaluationError: an address without a model or host, a model without an address, a command that is none.
    """
    if place is None:
        if model is not None:
            raise EvaluationError(f"--judge_model {model}: there is no --judge", "pass the address where it is asked")
        return None
    judge = Judge(place, model)
    if judge.online and model is None:
        raise EvaluationError(f"--judge {without_secrets(place)}: which model?", "pass --judge_model NAME")
    if not judge.online and model is not None:
        raise EvaluationError("--judge_model is for an address, and --judge is a command", "leave it out")
    shown = without_secrets(place)
    try:
        begin = _host(place) if judge.online else next(iter(shlex.split(place)), "")
    except ValueError as error:
        raise EvaluationError(f"--judge {shown}: {error}", HOW_TO_JUDGE) from error
    if not begin:
        raise EvaluationError(f"--judge {shown}: {'there is no host' if judge.online else 'it is empty'}", HOW_TO_JUDGE)
    if not judge.online and shutil.which(begin) is None:
        raise EvaluationError(f"--judge {shown}: it cannot be started: there is no program {begin}", HOW_TO_JUDGE)
    return judge


def _host(address: str) -> str:
    """The host of an address, "" where it has none.

    Raises:
        ValueError: it is no address, or its port is none.
    """
    parts = urlsplit(address)
    return (parts.hostname or "") if parts.port is None or parts.port else ""


def judged_scores(
    judge: Judge, prompt_of: Callable[[Row], str], rows: Sequence[Row], verdicts: Path | None
) -> list[float]:
    """Let a judge grade answers.

    Args:
        judge: who grades.
        prompt_of: what it is asked about a row.
        rows: with `id`, `question`, `prediction`, `answers`.
        verdicts: file of the verdicts, one JSON line each; what it holds is not asked for again. None keeps none.

    Returns:
        One score a row, 0 to 1; NaN where the verdict could not be read, which a warning counts and names.

    Raises:
        EvaluationError: the judge cannot be started or reached, refuses, ends, is silent, or none of its replies can be
            read; the verdicts so far are kept.
    """
    keys = [_key(judge, row, prompt_of(row)) for row in rows]
    known = _read(verdicts)
    waiting = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if waiting:
        console.say(f"judging {len(waiting):,} answers: {without_secrets(judge.place)} {judge.model or ''}".rstrip())
    unread: dict[str, str] = {}
    with _opened(verdicts) as stream, console.progress(len(waiting), "judging", "answers") as bar:
        start = stream.tell() if stream is not None else 0
        try:
            for key, reply in _replies(judge, prompt_of, waiting):
                score, reason = _verdict(reply)
                bar.advance(1)
                if math.isnan(score):
                    unread[key] = reply
                    continue
                known[key] = score
                if stream is not None:
                    line = {"key": key, "id": waiting[key]["id"], "score": score, "reason": reason}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    stream.flush()
        except OutOfStep:
            if stream is not None:
                stream.truncate(start)
            raise
    if unread:
        replies = [f"{quoted(waiting[key]['id'])}: {quoted(reply)}" for key, reply in unread.items()]
        _tell_unread(judge, replies, len(rows), any(key in known for key in keys))
    return [known.get(key, math.nan) for key in keys]


def _tell_unread(judge: Judge, replies: Sequence[str], count: int, others: bool) -> None:
    """Warn of verdicts that could not be read.

    Args:
        judge: whose they are.
        replies: what it said, each with the id of the answer.
        count: how many answers there are.
        others: whether there is a verdict on any of them.

    Raises:
        EvaluationError: there is none.
    """
    named = ", ".join(replies[:NAMED]) + (", …" if len(replies) > NAMED else "")
    if not others:
        what = f"--judge {without_secrets(judge.place)}: none of its {count:,} verdicts could be read ({named})"
        raise EvaluationError(what, 'it has to answer {"score": 0 to 1}; at an address, try another --judge_model')
    console.warn(
        f"{len(replies):,} of {count:,} verdicts of the judge could not be read and count as wrong, marked unjudged; "
        f"run again to ask for them again ({named})"
    )


def _key(judge: Judge, row: Row, prompt: str) -> str:
    """What a verdict is of: who graded, and what was asked."""
    asked = prompt if judge.online else [row["question"], row["prediction"], list(row["answers"]), prompt]
    text = json.dumps([judge.fingerprint(""), asked], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(verdicts: Path | None) -> dict[str, float]:
    """The verdicts of a file; a line that a kill tore off is passed over, and asked for again."""
    known = {}
    if verdicts is not None and verdicts.is_file():
        for line in verdicts.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                key, score = str(entry["key"]), float(entry["score"])
            except (ValueError, KeyError, TypeError):
                continue
            if 0 <= score <= 1:
                known[key] = score
    return known


def _opened(verdicts: Path | None) -> Any:
    """The file of verdicts, to be added to; nothing where there is none."""
    if verdicts is None:
        return contextlib.nullcontext()
    verdicts.parent.mkdir(parents=True, exist_ok=True)
    if verdicts.is_file() and not verdicts.read_bytes().endswith(b"\n") and verdicts.stat().st_size:
        with verdicts.open("a", encoding="utf-8") as torn:
            torn.write("\n")
    return verdicts.open("a", encoding="utf-8", errors=artifacts.UNENCODABLE)


def _verdict(reply: str) -> tuple[float, str]:
    """The score in a reply, and its reason; NaN where there is none from 0 to 1."""
    for text in (reply, *reversed(_SCORE.findall(reply))):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        score = value.get("score") if isinstance(value, dict) else None
        if isinstance(score, int | float) and 0 <= score <= 1:
            return float(score), str(value.get("reason", ""))
    return math.nan, ""


def _replies(judge: Judge, prompt_of: Callable[[Row], str], rows: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Ask about rows, and yield each one's key with what the judge replies."""
    if judge.online:
        return _asked_online(judge, prompt_of, rows)
    lines = {
        key: {name: row[name] for name in ("id", "question", "prediction", "answers")} | {"prompt": prompt_of(row)}
        for key, row in rows.items()
    }
    return asked_program(judge.place, f"--judge {without_secrets(judge.place)}", lines)


def _asked_online(judge: Judge, prompt_of: Callable[[Row], str], rows: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Ask a model about several rows at once, and yield its replies as they come."""
    stopped = threading.Event()

    def reply(row: Row) -> str:
        text = ""
        for _ in range(READINGS):
            text = _complete(judge, prompt_of(row), stopped)
            if not math.isnan(_verdict(text)[0]):
                break
        return text

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        asked = {pool.submit(reply, row): key for key, row in rows.items()}
        try:
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers and keys go to the address that the user gave, and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing."""


def _complete(judge: Judge, prompt: str, stopped: threading.Event) -> str:
    """One reply of a model, through an OpenAI-compatible chat completion; no try follows once it is stopped.

    Raises:
        EvaluationError: the server refuses, or does not answer after `TRIES` requests.
    """
    address = judge.place.rstrip("/")
    address += "" if address.endswith("/chat/completions") else "/chat/completions"
    body = {"model": judge.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json"}
    if key := next((os.environ[name].strip() for name in KEYS if os.environ.get(name)), ""):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NoRedirect)
    problem = ""
    for number in range(TRIES):
        wait = float(2**number)
        try:
            with opener.open(request, timeout=SECONDS) as response:
                return _content(response.read())
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace').strip()}"
            if error.code not in _RETRIED:
                break
            wait = _asked_wait(error.headers.get("Retry-After"), wait)
        except (OSError, HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        except ValueError as error:
            problem = str(error)
        if stopped.is_set() or number + 1 == TRIES:
            break
        time.sleep(wait)
    raise EvaluationError(
        f"--judge {without_secrets(address)}: {bounded(without_secrets(problem), 500)}",
        f"check address, --judge_model and the key in {' or '.join(KEYS)}; run again: the verdicts so far are kept",
    )


def _content(data: bytes) -> str:
    """The text of a chat completion.

    Raises:
        ValueError: it is none.
    """
    try:
        return str(json.loads(data)["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no chat completion: {quoted(data.decode('utf-8', 'replace').strip())}") from error


def _asked_wait(header: str | None, default: float) -> float:
    """Seconds that a server asks to wait, at most `LONGEST_WAIT`."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or default)))
    except ValueError:  # a date
        return default

"""A judge that grades answers: a program of the user's, or a model at an address that the user gives."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm_sft.common import artifacts, console
from vlm_sft.common.errors import EvaluationError, bounded, quoted, without_secrets

HOW_TO_JUDGE = "pass --judge COMMAND, or --judge http://…/v1 --judge_model NAME"
KEYS = ("VLM_SFT_JUDGE_KEY", "OPENAI_API_KEY")  # variables with the key of the address, the first that is set
TRIES = 5  # of one request; in between 1, 2, 4 and 8 seconds, or what the server asks for
READINGS = 2  # requests for one verdict, where the first reply cannot be read
REQUESTS_AT_ONCE = 8
SECONDS = 120.0  # for one reply
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
        EvaluationError: an address without a model, or a model without an address.
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
    if not judge.online and not shlex.split(place):
        raise EvaluationError("--judge is empty", "pass a command, or http(s)://… of an OpenAI-compatible server")
    return judge


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
        EvaluationError: the judge cannot be started or reached, refuses, or ends; the verdicts so far are kept.
    """
    keys = [_key(judge, row, prompt_of(row)) for row in rows]
    known = _read(verdicts)
    waiting = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if waiting:
        console.say(f"judging {len(waiting):,} answers: {without_secrets(judge.place)} {judge.model or ''}".rstrip())
    ask = _asked_online if judge.online else _asked_command
    unread: dict[str, str] = {}
    with _opened(verdicts) as stream, console.progress(len(waiting), "judging", "answers") as bar:
        for key, reply in ask(judge, prompt_of, waiting):
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
    if unread:
        named = ", ".join(f"{quoted(waiting[key]['id'])}: {quoted(unread[key])}" for key in list(unread)[:NAMED])
        console.warn(
            f"{len(unread):,} of {len(rows):,} verdicts of the judge could not be read and count as wrong, marked "
            f"unjudged; run again to ask for them again ({named}{', …' if len(unread) > NAMED else ''})"
        )
    return [known.get(key, math.nan) for key in keys]


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
                known[str(entry["key"])] = float(entry["score"])
            except (ValueError, KeyError, TypeError):
                continue
    return known


def _opened(verdicts: Path | None) -> Any:
    """The file of verdicts, to be added to; nothing where there is none."""
    from contextlib import nullcontext

    if verdicts is None:
        return nullcontext()
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


def _asked_command(judge: Judge, prompt_of: Callable[[Row], str], rows: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Give a program one line a row, and yield the line that it answers with."""
    if not rows:
        return
    try:
        process = subprocess.Popen(
            shlex.split(judge.place), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
    except OSError as error:
        what = f"--judge {judge.place}: it cannot be started: {error.strerror}"
        raise EvaluationError(what, "pass a command that runs here") from error
    assert process.stdin is not None and process.stdout is not None
    try:
        for key, row in rows.items():
            line = {name: row[name] for name in ("id", "question", "prediction", "answers")}
            reply = _exchange(process.stdin, process.stdout, json.dumps(line | {"prompt": prompt_of(row)}))
            if not reply:
                what = f"--judge {judge.place} ended at {quoted(row['id'])} (exit code {process.wait()})"
                raise EvaluationError(what, "let it answer every line with one line of JSON, then run again")
            yield key, reply.strip()
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _exchange(to: IO[str], back: IO[str], line: str) -> str:
    """Write one line and read one; "" where the program has ended."""
    try:
        to.write(line + "\n")
        to.flush()
        return back.readline()
    except BrokenPipeError:
        return ""


def _asked_online(judge: Judge, prompt_of: Callable[[Row], str], rows: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Ask a model about several rows at once, and yield its replies as they come."""

    def reply(row: Row) -> str:
        text = ""
        for _ in range(READINGS):
            text = _complete(judge, prompt_of(row))
            if not math.isnan(_verdict(text)[0]):
                break
        return text

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        asked = {pool.submit(reply, row): key for key, row in rows.items()}
        try:
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers and keys go to the address that the user gave, and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing."""


def _complete(judge: Judge, prompt: str) -> str:
    """One reply of a model, through an OpenAI-compatible chat completion.

    Raises:
        EvaluationError: the server refuses, or does not answer after `TRIES` requests.
    """
    address = judge.place.rstrip("/")
    address += "" if address.endswith("/chat/completions") else "/chat/completions"
    body = {"model": judge.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json"}
    if key := next((os.environ[name] for name in KEYS if os.environ.get(name)), ""):
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
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if number + 1 < TRIES:
            time.sleep(wait)
    raise EvaluationError(
        f"--judge {without_secrets(address)}: {bounded(without_secrets(problem), 500)}",
        f"check address, --judge_model and the key in {' or '.join(KEYS)}; run again: the verdicts so far are kept",
    )


def _content(data: bytes) -> str:
    """The text of a chat completion."""
    return str(json.loads(data)["choices"][0]["message"]["content"] or "")


def _asked_wait(header: str | None, default: float) -> float:
    """Seconds that a server asks to wait, at most `LONGEST_WAIT`."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or default)))
    except ValueError:  # a date
        return default

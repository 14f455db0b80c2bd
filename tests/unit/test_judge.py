"""A judge grades answers: a program, or a model at an address; real processes and a server of this machine."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import vlm_sft as vs
from tests.pictures import COLOURS, png
from vlm_sft.cli.main import main
from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate import judge as judging
from vlm_sft.evaluate import judge_program
from vlm_sft.evaluate.grading import chartmuseum_grading, charxiv_grading, general_grading
from vlm_sft.evaluate.judge import parse_judge

PROGRAM = """
import json, pathlib, sys
for number, line in enumerate(sys.stdin):
    row = json.loads(line)
    assert row["question"] in row["prompt"] and row["answers"][0] in row["prompt"]
    with open("asked.txt", "a") as file:
        file.write(row["id"] + "\\n")
    if row["prediction"] == "end":
        sys.exit(3)
    right = row["answers"][0].lower() in row["prediction"].lower()
    verdict = json.dumps({"score": 0.5 + right / 2, "reason": "seen"})
    print('{"score": null}' if row["prediction"] == "odd" else verdict, flush=True)
"""


def row(number: int, prediction: str, answer: str = "Red", **more: Any) -> dict[str, Any]:
    return {"id": f"q{number}", "question": f"Colour {number}?", "prediction": prediction, "answers": [answer]} | more


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_SFT_CACHE", str(tmp_path / "cache"))
    for name in judging.KEYS:
        monkeypatch.delenv(name, raising=False)
    Path("grader.py").write_text(PROGRAM)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return name


COMMAND = f"{sys.executable} grader.py"


def test_a_program_grades_and_nothing_is_asked_twice(capsys: pytest.CaptureFixture[str]) -> None:
    write("p.jsonl", [row(1, "it is red"), row(2, "blue"), row(3, "odd")])
    flags = ["--metric", "judge", "--judge", COMMAND, "--predictions", "p.jsonl"]
    assert main(["score", *flags, "--per_item", "items.jsonl"]) == 0
    told = capsys.readouterr()
    assert "1 of 3 verdicts of the judge could not be read" in told.err and """'q3': '{"score": null}'""" in told.err
    assert [json.loads(line)["score"] for line in Path("items.jsonl").read_text().splitlines()] == [1.0, 0.5, 0.0]
    assert "unjudged, count as wrong" in told.out
    kept = [json.loads(line) for line in Path("p.jsonl.judge.jsonl").read_text().splitlines()]
    assert [(one["id"], one["score"], one["reason"]) for one in kept] == [("q1", 1.0, "seen"), ("q2", 0.5, "seen")]
    assert main(["score", *flags]) == 0
    assert Path("asked.txt").read_text().split() == ["q1", "q2", "q3", "q3"]  # only the unreadable one again


def test_a_program_that_ends_leaves_its_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["score", "--metric", "judge", "--judge", COMMAND, "--predictions", "p.jsonl"]
    write("p.jsonl", [row(1, "red"), row(2, "end"), row(3, "red")])
    assert main(flags) == 2
    assert "ended at 'q2' (exit code 3)" in capsys.readouterr().err
    with Path("p.jsonl.judge.jsonl").open("a") as torn:
        torn.write('{"key": "a", "sco')
    write("p.jsonl", [row(1, "red"), row(3, "red")])
    assert main(flags) == 0
    assert Path("asked.txt").read_text().split() == ["q1", "q2", "q3"]
    assert main([*flags[:4], "no-such-program-here", *flags[5:]]) == 2
    assert "cannot be started" in capsys.readouterr().err


VERDICT = 'print(json.dumps({"score": 1}), flush=True)'


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "print('loading a model', flush=True)\nfor line in sys.stdin: " + VERDICT,
            "'loading a model', no JSON object",
        ),
        ("for line in sys.stdin: print('rubbish', flush=True)", "answered 'q1' with 'rubbish'"),
        ("for line in sys.stdin: print(flush=True)", "answered 'q1' with ''"),
        ("for line in sys.stdin: sys.stdout.buffer.write(b'\\xff\\n'), sys.stdout.flush()", "no JSON object"),
        (f"for line in sys.stdin: {VERDICT}; {VERDICT}", "more lines than it was asked for"),
        ("for line in sys.stdin: print('{\"score\": 7}', flush=True)", "none of its 2 verdicts could be read"),
        ("sys.exit('no key')", "ended at 'q1' (exit code 1)"),
        (f"sys.stdin.readline(); {VERDICT}; sys.stdout.close(); os.close(1)", "ended at 'q2' (exit code 0)"),
        ("time.sleep(60)", "no answer about 'q1' within 1 s"),
        ("subprocess.run(['sleep', '60'])", "no answer about 'q1' within 1 s"),  # what it started ends with it
    ],
)
def test_no_verdict_of_a_program_that_is_out_of_step(
    program: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_program, "PATIENCE", 1.0)
    Path("bad.py").write_text(f"import json, os, subprocess, sys, time\n{program}\n")
    write("p.jsonl", [row(1, "red"), row(2, "blue")])
    flags = ["--predictions", "p.jsonl", "--per_item", "items.jsonl"]
    assert main(["score", "--metric", "judge", "--judge", f"{sys.executable} bad.py", *flags]) == 2
    told = capsys.readouterr().err
    assert words in told and "fix:" in told and "Traceback" not in told
    kept = Path("p.jsonl.judge.jsonl").read_text()
    assert not Path("items.jsonl").exists() and kept.count("score") == words.count("q2")


def test_a_program_that_stays_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_program, "GRACE", 0.5)
    Path("stays.py").write_text(f"import json, sys, time\nfor line in sys.stdin: {VERDICT}\ntime.sleep(60)\n")
    write("p.jsonl", [row(1, "red")])
    assert vs.score(None, "p.jsonl", metric="judge", judge=f"{sys.executable} stays.py")["judge"]["accuracy"] == 1.0


class Model(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that grades by whether the answer is in the text; it is busy at first."""

    asked: list[dict[str, Any]] = []
    keys: list[str | None] = []
    busy = 1
    elsewhere = False
    slow = threading.Event()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Model.asked.append(request | {"path": self.path})
        Model.keys.append(self.headers.get("Authorization"))
        if Model.elsewhere:
            self.send_response(302)
            self.send_header("Location", "/v1/other")
            self.end_headers()
            return
        if Model.busy:
            Model.busy -= 1
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        prompt = request["messages"][0]["content"]
        if request["model"] == "unknown":
            self.answer(404, {"error": "no such model"})
            return
        if request["model"] == "slow":
            Model.slow.wait(5)
            return
        if request["model"] == "page":
            self.answer(200, "<html>")
            return
        if request["model"] == "mute":
            self.answer(200, {"choices": [{"message": {"content": None}}]})
            return
        text = "<think>{maybe}</think> Verdict: " + json.dumps({"score": int("Answer to grade: red" in prompt)})
        self.answer(200, {"choices": [{"message": {"content": "?" if "Colour 3" in prompt else text}}]})

    def answer(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    Model.asked, Model.keys, Model.busy, Model.elsewhere = [], [], 1, False
    made = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_model_at_an_address_grades(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("VLM_SFT_JUDGE_KEY", "sk-mine")
    write("p.jsonl", [row(1, "red"), row(2, "blue"), row(3, "red")])
    flags = ["score", "--metric", "judge", "--judge", server, "--predictions", "p.jsonl"]
    assert main([*flags, "--judge_model", "grader", "--per_item", "items.jsonl"]) == 0
    told = capsys.readouterr()
    assert [json.loads(line)["score"] for line in Path("items.jsonl").read_text().splitlines()] == [1.0, 0.0, 0.0]
    assert "1 of 3 verdicts" in told.err and "sk-mine" not in told.err + told.out
    assert len(Model.asked) == 1 + 2 + judging.READINGS and set(Model.keys) == {"Bearer sk-mine"}
    assert {one["path"] for one in Model.asked} == {"/v1/chat/completions"}
    assert {(one["model"], one["temperature"]) for one in Model.asked} == {("grader", 0)}
    Model.asked.clear()
    assert main([*flags, "--judge_model", "grader"]) == 0
    assert len(Model.asked) == judging.READINGS  # the unreadable one
    assert main([*flags, "--judge_model", "unknown"]) == 2
    assert "HTTP 404" in capsys.readouterr().err
    Model.elsewhere = True
    assert main([*flags, "--judge_model", "third"]) == 2
    assert "HTTP 302" in capsys.readouterr().err and all(one["path"].endswith("/completions") for one in Model.asked)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("slow", "timed out"),
        ("page", "no chat completion: '\"<html>\"'"),
        ("mute", "none of its 1 verdicts could be read"),
    ],
)
def test_a_server_that_gives_no_verdict_is_an_error(
    server: str, model: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging.time, "sleep", lambda _: None)
    monkeypatch.setattr(judging, "SECONDS", 0.2)
    Model.busy = 0
    Model.slow.clear()
    write("p.jsonl", [row(1, "red")])
    flags = ["--metric", "judge", "--judge", server, "--judge_model", model, "--predictions", "p.jsonl"]
    assert main(["score", *flags]) == 2
    Model.slow.set()
    told = capsys.readouterr().err
    assert words in told and server in told and "Traceback" not in told


def test_an_address_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(judging.time, "sleep", waits.append)
    write("p.jsonl", [row(1, "red")])
    with pytest.raises(EvaluationError, match="Connection refused"):
        vs.score(None, "p.jsonl", metric="judge", judge="http://127.0.0.1:9", judge_model="any")
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metric", "judge"], "graded by a judge, and there is none"),
        (["--benchmark", "charxiv"], "graded by a judge, and there is none"),
        (["--metric", "anls", "--judge", COMMAND], "nothing here is judged"),
        (["--metric", "judge", "--judge", "http://127.0.0.1:9"], "which model?"),
        (["--metric", "judge", "--judge", COMMAND, "--judge_model", "x"], "--judge_model is for an address"),
        (["--metric", "judge", "--judge_model", "x"], "there is no --judge"),
        (["--metric", "judge", "--judge", "python 'x"], "--judge python 'x: No closing quotation"),
        (["--metric", "judge", "--judge", " "], "it is empty"),
        (["--metric", "judge", "--judge", "htp://localhost/v1"], "there is no program htp://localhost/v1"),
        (["--metric", "judge", "--judge", "http:///v1", "--judge_model", "x"], "http:///v1: there is no host"),
        (["--metric", "judge", "--judge", "http://[x/v1", "--judge_model", "x"], "--judge http://[x/v1: Invalid IPv6"),
        (["--metric", "judge", "--judge", "http://h:x/v1", "--judge_model", "x"], "--judge http://h:x/v1: Port"),
    ],
)
def test_mistakes_in_the_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("p.jsonl", [row(1, "red")])
    assert main(["score", "--predictions", "p.jsonl", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_question_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text('{"id": 1, "prediction": "a", "answers": ["a"]}\n')
    assert main(["score", "--predictions", "p.jsonl", "--metric", "judge", "--judge", COMMAND]) == 2
    assert "has no 'question', which a judge reads" in capsys.readouterr().err


def test_an_evaluation_is_judged_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for index, colour in enumerate(COLOURS[:3]):
        Path(f"{index}.png").write_bytes(png(colour, (56, 56)))
        rows.append({"image": f"{index}.png", "question": f"Colour {index}?", "answer": colour, "split": "test"})
    write("mine.jsonl", rows)
    flags = [
        "eval",
        "--base_model",
        "pocket",
        "--benchmark",
        "mine.jsonl",
        "--max_new_tokens",
        "4",
        "--metric",
        "judge",
    ]
    assert main([*flags, "--output_dir", "one", "--judge", COMMAND]) == 0
    results = json.loads(Path("one/mine/results.json").read_text())
    said = [json.loads(line) for line in Path("one/mine/predictions.jsonl").read_text().splitlines()]
    assert [one["score"] for one in said] == [
        1.0 if one["answers"][0] in one["prediction"].lower() else 0.5 for one in said
    ]
    assert results["metric"] == "judge" and len(results["metric_sha256"]) == 64
    assert len(Path("one/mine/judge.jsonl").read_text().splitlines()) == 3
    asked = Path("asked.txt").read_text()
    assert main([*flags, "--output_dir", "one", "--judge", COMMAND]) == 0 and Path("asked.txt").read_text() == asked
    assert main([*flags, "--output_dir", "two", "--judge", f"{COMMAND} --strict"]) == 0
    capsys.readouterr()
    assert main(["compare", "one", "two"]) == 2
    assert "judge by different versions of its source" in capsys.readouterr().err
    assert main(["compare", "one", "two", "--metric", "anls"]) == 0


def test_prompts_follow_the_kind_of_answer() -> None:
    number = charxiv_grading(row(1, "1e3", "1000", question_type="number in chart"))
    assert "exactly the value" in number and "Colour 1?" in number and "Expected answer: 1000" in number
    text = charxiv_grading(row(1, "alpha", question_type="text in chart"))
    assert "same terms" in text and text != number
    tagged = chartmuseum_grading(row(1, "long thoughts about 7 <answer> 42 </answer>"))
    assert "Answer to grade: 42\n" in tagged and "thoughts" not in tagged
    assert "Answer to grade: plain\n" in chartmuseum_grading(row(1, "plain"))
    assert general_grading(row(1, "x") | {"answers": ["a", "b", "a"]}).count("Expected answer") == 2
    assert parse_judge(None, None) is None


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 1}', 1.0),
        ('```json\n{"score": 0.25, "reason": "half"}\n```', 0.25),
        ('{"score": true}', 1.0),
        ('first {"score": 0} then {"score": 1}', 1.0),
        ('{"score": 2}', None),
        ('{"score": "1"}', None),
        ("yes", None),
        ("", None),
        ("[1]", None),
    ],
)
def test_verdicts_are_read_or_not(reply: str, score: float | None) -> None:
    found = judging._verdict(reply)[0]
    assert found == score if score is not None else found != found

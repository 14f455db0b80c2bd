"""The live page: what it shows of a run that goes on, and `watch` of a real training."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerCallback

import vlm_sft as vs
from tests import chromium
from tests.report_runs import Page, make_run, record
from vlm_sft.common import artifacts
from vlm_sft.report.serve import ADDRESS, PORT, LiveReport, make_server
from vlm_sft.train.live_page import live_page

FORECAST = {"time_seconds": {"value": 60.0, "low": 50.0, "high": 70.0}, "items": {"time_seconds": {"saving": 1.0}}}


def answered(run: Path, step: int, predictions: dict[str, str]) -> None:
    """Validation answers of one step, right where they are "yes"."""
    folder = run / artifacts.VALIDATION_FOLDER / f"step-{step}" / "own"
    rows = [
        {"id": name, "image": f"images/{name}.webp", "question": f"Is it {name}?", "prediction": text}
        | {"answers": ["yes"], "score": float(text == "yes")}
        for name, text in predictions.items()
    ]
    artifacts.write_jsonl(folder / artifacts.PREDICTIONS, rows)
    artifacts.write_json(folder / "results.json", {"schema": 1})


def running(folder: Path, **facts: Any) -> Path:
    run = make_run(folder, steps=20)
    seconds = {"data": 1.0, "load": 4.1}
    artifacts.write_json(run / artifacts.RUN, record("running") | {"seconds": seconds, "forecast": FORECAST} | facts)
    for name in ("results.json", artifacts.GUARD):
        (run / name).unlink(missing_ok=True)
    return run


def test_progress_comes_first_then_curves_then_the_newest_answers(tmp_path: Path) -> None:
    run = running(tmp_path / "run", schedule={"steps": 40})
    answered(run, 8, {"a": "no", "b": "yes", "c": "no"})
    answered(run, 16, {"a": "yes", "b": "no", "c": "no"})
    pictures = run / artifacts.VALIDATION_FOLDER / "images"
    pictures.mkdir()
    for name in "abc":
        Image.new("RGB", (40, 30), "red").save(pictures / f"{name}.webp")
    page = Page(LiveReport([run]).page())
    (bar,) = page.all("progress")
    assert (bar["value"], bar["max"]) == ("20", "40") and "20 of 40" in page.text
    (left,) = [a for a in page.all("dd") if "data-until" in a]
    assert float(left["data-until"]) > 0
    order = [page.text.index(word) for word in ("time left", "Loss", "Validation answers at step 16", "No results")]
    assert order == sorted(order)
    assert re.search(r"\bown\s*:\s+1 of 3 right,\s+1 at step 8\b", page.text)
    shown = [a["alt"] for a in page.all("img") if "Is it" in a.get("alt", "")]
    assert sorted(shown) == [f"Picture to the question: Is it {name}?" for name in "abc"]
    assert shown[0].endswith("Is it a?"), "what changed comes first"
    assert "✓" in page.text and "✗" in page.text


@pytest.mark.parametrize(
    "seconds, lines, stage",
    [
        ({}, 0, "Reading the data"),
        ({"data": 1.0}, 0, "Preparing questions and images"),
        ({"data": 1.0, "load": 1.0}, 0, "Loading the model"),
        ({"data": 1.0, "load": 1.0}, 3, "Training"),
        ({"data": 1.0, "load": 1.0, "train": 9.0}, 20, "Final evaluation"),
    ],
)
def test_the_stage_is_told(tmp_path: Path, seconds: dict[str, float], lines: int, stage: str) -> None:
    run = running(tmp_path / "run", seconds=seconds, schedule={"steps": 20})
    rows = [{"step": step, "time": float(step), "loss": 1.0} for step in range(1, lines + 1)]
    artifacts.write_jsonl(run / artifacts.METRICS, rows)
    page = Page(LiveReport([run]).page())
    assert re.search(rf"\b{stage}\b", page.text)


def test_a_run_that_is_over_has_no_live_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    page = Page(LiveReport([run]).page())
    assert not page.all("progress") and "time left" not in page.text


def test_only_the_first_rank_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with live_page(tmp_path, True):
        pass
    monkeypatch.setenv("RANK", "0")
    with live_page(tmp_path, False):
        pass
    assert capsys.readouterr().out == ""


@pytest.fixture
def taken() -> Iterator[None]:
    """The usual port is another program's."""
    try:
        listening = socket.create_server((ADDRESS, PORT))
    except OSError:  # so it is already
        yield
        return
    with closing(listening):
        yield


def ask(port: int) -> str:
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=60)
    connection.request("GET", "/")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_a_training_serves_its_page_until_it_ends(tmp_path: Path, taken: None) -> None:
    seen: list[str] = []

    class Reader(TrainerCallback):
        """Looks at the page in the middle of the training."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                log = (tmp_path / "run" / artifacts.LOG).read_text()
                (port,) = re.findall(r"live page: http://127\.0\.0\.1:(\d+)/", log)
                seen.extend((port, ask(int(port))))

    rows = [{"image": Image.new("RGB", (40 + n, 40), "red"), "question": "Which?", "answer": "red"} for n in range(12)]
    run = vs.finetune(
        rows,
        base_model="pocket",
        output_dir=tmp_path / "run",
        max_steps=3,
        global_batch_size=4,
        eval_benchmarks="none",
        report_to="none",
        logging_steps=1,
        watch=True,
        callbacks=[Reader()],
    )
    port, page = int(seen[0]), Page(seen[1])
    assert port != PORT and "of 3" in page.text and page.all("progress")
    assert "follow it in a browser" not in (run.folder / artifacts.LOG).read_text()
    assert run.record["schedule"]["steps"] == 3
    time.sleep(0.1)
    with pytest.raises(OSError):
        ask(port)
    assert json.loads((run.folder / artifacts.RUN).read_text())["status"] == "finished"


def becomes_the_report(browser: chromium.Chromium) -> bool:
    """Whether the page loads itself anew, without its live part, within some seconds."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        with suppress(AssertionError):  # asked in the moment of loading
            if browser.run("!document.querySelector('progress')"):
                return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed")
def test_what_a_training_adds_appears_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_sft.report.serve.LIVE_SHARE", 1.0)
    run = running(tmp_path / "run", schedule={"steps": 40})
    server = make_server([run], 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    step = "document.querySelector('progress').value"
    wait = "new Promise(done => { const look = () => CHECK ? done(true) : setTimeout(look, 100); look(); })"
    try:
        for phone in (False, True):
            with chromium.Chromium(width=390 if phone else 1200, height=844, dark=phone, phone=phone) as browser:
                browser.open(f"http://127.0.0.1:{server.server_port}/")
                before = browser.run(step)
                browser.run("window.mark = 'not loaded anew'")
                with (run / artifacts.METRICS).open("a") as stream:
                    stream.write(json.dumps({"step": before + 5, "time": 9.0, "loss": 0.1}) + "\n")
                assert browser.run(wait.replace("CHECK", f"{step} === {before + 5}"))
                assert browser.run("window.mark") == "not loaded anew"
                assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
                assert browser.messages == []
                if phone:
                    artifacts.write_json(run / artifacts.RUN, record("finished"))
                    assert becomes_the_report(browser)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)

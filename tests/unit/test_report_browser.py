"""The page in a real Chromium: its script, hostile texts, phone, dark mode, keyboard, paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chromium
from tests.report_runs import make_run, record
from vlm_sft.common import artifacts
from vlm_sft.report.html import RUNS_WITH_FIGURES, write_report

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed")

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
RIGHT_TO_LEFT = "\u202eמה הערך?"
LONG = "W" * 3000


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("browser") / "run", steps=20)
    for side in ("base", "tuned"):
        path = folder / "evaluation" / side / "easy_vqa" / artifacts.PREDICTIONS
        rows = list(artifacts.read_jsonl(path))
        rows[0] |= {"question": HOSTILE, "prediction": HOSTILE, "answers": [HOSTILE], "question_type": HOSTILE}
        rows[1] |= {"question": RIGHT_TO_LEFT, "prediction": LONG}
        rows[2] |= {"image": "images/gone.png"}
        artifacts.write_jsonl(path, rows)
    return write_report([folder], folder / "report.html")


def choose(browser: chromium.Chromium, name: str, value: str) -> None:
    browser.run(
        f"(() => {{ const one = document.getElementById('filter-{name}'); one.value = {value!r};"
        "one.dispatchEvent(new Event(one.tagName === 'INPUT' ? 'input' : 'change')); })()"
    )
    browser.run("new Promise(done => setTimeout(done, 200))")


def texts(browser: chromium.Chromium, selector: str) -> list[str]:
    found: list[str] = browser.run(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)")
    return found


def test_the_predictions_can_be_filtered_and_searched(report: Path) -> None:
    with chromium.Chromium() as browser:
        browser.open(report)
        assert texts(browser, "#filter-count") == ["40 of 40 questions"]
        assert len(texts(browser, "#cards .card")) == 24
        browser.run("document.getElementById('more').click()")
        assert len(texts(browser, "#cards .card")) == 40
        choose(browser, "outcome", "01")
        # The made-up run answers every fourth question wrongly before and rightly after.
        assert texts(browser, "#filter-count") == ["10 of 40 questions"]
        assert set(texts(browser, "#cards .outcome")) == {"wrong → right"}
        choose(browser, "outcome", "changed")
        assert texts(browser, "#filter-count") == ["20 of 40 questions"]
        choose(browser, "benchmark", "demo_charts")
        assert texts(browser, "#filter-count") == ["10 of 40 questions"]
        choose(browser, "outcome", "")
        choose(browser, "text", "BAR 17?")
        assert texts(browser, "#cards .question") == ["What is the value of bar 17?"]
        choose(browser, "text", "no such words")
        assert texts(browser, "#cards .card") == [] and texts(browser, "#filter-count") == ["0 of 40 questions"]
        assert browser.messages == []
        assert {one.partition(":")[0] for one in browser.requests} <= {"file", "data"}


def test_hostile_texts_are_texts(report: Path) -> None:
    with chromium.Chromium() as browser:
        browser.open(report)
        choose(browser, "text", "window.hacked")
        assert texts(browser, "#cards .question") == [HOSTILE] and texts(browser, "#cards .reference bdi") == [HOSTILE]
        assert browser.run("typeof window.hacked") == "undefined"
        assert browser.run("document.querySelectorAll('.card script, .card [onerror]').length") == 0
        # Even a script that got in would not run: the policy names the page's own.
        browser.run(
            "(() => { const one = document.createElement('script'); one.textContent = 'window.hacked = 3';"
            "document.body.append(one); })()"
        )
        assert browser.run("typeof window.hacked") == "undefined"
        assert any("Content Security Policy" in one for one in browser.messages)
        choose(browser, "text", "הערך")
        assert browser.run("getComputedStyle(document.querySelector('#cards .question')).direction") == "rtl"
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        choose(browser, "text", "easy_vqa/test/000002")
        assert texts(browser, "#cards .picture") == ["picture missing: it is not in the run's evaluation/images"]


def test_phone_dark_mode_keyboard_and_paper(report: Path, tmp_path: Path) -> None:
    with chromium.Chromium(width=390, height=844, dark=True, phone=True) as browser:
        browser.open(report)
        assert browser.run("document.documentElement.scrollWidth") == 390
        colour = "getComputedStyle(document.querySelector('main section')).{}"
        assert browser.run(colour.format("backgroundColor")) == "rgb(26, 32, 40)"
        assert browser.run(colour.format("color")) == "rgb(228, 233, 240)"
        browser.key("Tab")
        assert browser.run("document.activeElement.textContent") == "Skip to the content"
        browser.key("/", "/")
        assert browser.run("document.activeElement.id") == "filter-text"
        browser.key("7", "7")
        browser.run("new Promise(done => setTimeout(done, 300))")
        assert browser.run("document.getElementById('filter-text').value") == "7"
        assert 0 < browser.run("document.querySelectorAll('.card').length") < 40
        unnamed = (
            "[...document.querySelectorAll('img, svg[role=img], select, input, button')].filter(one => "
            "!(one.alt || one.ariaLabel || one.textContent || one.closest('label'))).length"
        )
        assert browser.run(unnamed) == 0
        assert browser.pdf(tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
        browser.send("Emulation.setEmulatedMedia", media="print")
        assert browser.run("getComputedStyle(document.getElementById('filters')).display") == "none"


def test_the_parts_of_many_runs_appear_when_opened(tmp_path: Path) -> None:
    folders = [tmp_path / f"run{number}" for number in range(RUNS_WITH_FIGURES + 1)]
    for folder in folders:
        artifacts.write_json(folder / artifacts.RUN, record())
    with chromium.Chromium() as browser:
        browser.open(write_report(folders, tmp_path / "many.html"))
        assert texts(browser, "main h2")[-1] == "Runs"
        browser.run("location.hash = 'run13'")
        browser.run("new Promise(done => setTimeout(done, 200))")
        assert texts(browser, "details.run h2") == ["Results", "Training", "Data", "Cost", "Parameters", "Environment"]
        assert browser.messages == []


def test_tables_of_many_runs_can_be_sorted(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, steps=5) for name in ("b", "a")]
    page = write_report(folders, tmp_path / "two.html")
    with chromium.Chromium() as browser:
        browser.open(page)
        names = "#comparison .runs tbody th"
        assert texts(browser, names) == ["b", "a"]
        browser.run("document.querySelector('#comparison .runs .sort').click()")
        browser.run("document.querySelector('#comparison .runs .sort').click()")
        assert texts(browser, names) == ["a", "b"]
        assert browser.run("document.querySelector('#comparison .runs th').ariaSort") == "ascending"
        choose(browser, "run", "1")
        choose(browser, "beside", "0")
        assert texts(browser, "#cards .card .answer .small")[0].startswith("b: ")
        browser.run("location.hash = 'run2'")
        browser.run("new Promise(done => setTimeout(done, 100))")
        assert browser.run("document.getElementById('run2').open") is True
        assert browser.messages == []

"""Hostile texts: in names, questions, answers and file names; in pages, cards, tables, figures and the terminal."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from tests.faults.situations.place import Place, Stage
from tests.wording import line_with

situation = Stage("hostile texts")
MARKUP = '</script><script>alert(7)</script><img src=x onerror="alert(7)">'
NAME = "<img src=x onerror=alert(7)>"
ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\u202etxt"


class _Tags(HTMLParser):
    """Elements of a page that the texts would have brought in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if "onerror" in dict(attrs) or (tag == "img" and dict(attrs).get("src") == "x"):
            self.found.append(tag)


def injected(page: Path) -> list[str]:
    """Hostile elements in a page, and scripts that begin with the hostile one."""
    text = page.read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(text)
    return tags.found + re.findall(r"<script[^>]*>\s*alert\(7\)", text)


@situation(
    "HTML and </script> in questions, answers, splits, system text and folder names; report, data check, compare"
)
def markup_in_pages(place: Place) -> str:
    data = place.data(NAME)
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for row in rows:
        part = MARKUP if row["split"] == "test" else row["split"]
        row |= {
            "question": row["question"] + MARKUP,
            "answer": MARKUP,
            "split": part,
            "id": f"{row['question']}{row['image']}{MARKUP}",
        }
    place.data(NAME, rows)
    run = place.folder / f"run {NAME}"
    place.run(*place.train(data, run, "--eval_benchmarks", data, "--system", MARKUP))
    place.run("report", run, "--output", place.folder / "report.html")
    place.run("data", "check", data, "--output_dir", place.folder / "check")
    pages = [run / "report.html", place.folder / "report.html", place.folder / "check" / "preview.html"]
    assert not [tag for page in pages for tag in injected(page)], [injected(page) for page in pages]
    return f"shown as text in {len(pages)} pages"


@situation("Markdown, HTML and line ends in names of data sets and runs; README.md, results and compare.md")
def markup_in_markdown(place: Place) -> str:
    name = "own|x\n# Owned\n<script>`[click](evil)"
    data, run = place.data("d"), place.folder / "r|un\n# Owned\n<b>"
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    place.data(name, [row | {"split": name if row["split"] == "test" else row["split"]} for row in rows])
    data = place.folder / name
    place.run(*place.train(data, run, "--eval_benchmarks", data))
    other = place.folder / "copy"
    shutil.copytree(run, other)
    place.run("compare", run, other, "--output_dir", place.folder / "compared")
    place.run("report", run, place.finished, "--export", place.folder / "figures")
    texts = [run / "README.md", place.folder / "compared" / "compare.md", *(place.folder / "figures").glob("*.md")]
    bad = [path.name for path in texts if re.search(r"^# Owned|(?<!\\)<(?:script|b)>", path.read_text(), re.MULTILINE)]
    assert not bad, (bad, (run / "README.md").read_text()[:1500])
    return f"one line each, marks escaped, in {len(texts)} files"


@situation("a base model's folder whose name closes the string of the card's Python code")
def code_in_a_card(place: Place) -> str:
    from tests.adapters import save_base

    base = save_base(place.folder / 'x"); import os; os.system("touch owned"); ("')
    run = place.folder / "run"
    place.run(*place.train(place.data(), run, "--base_model", base, "--max_steps", "1"))
    text = (run / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None, text
    imports = [node for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Import)]
    assert not imports, code[1]
    texts = [node.value for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Constant)]
    assert base.name in texts, texts
    return "the name is a quoted string of the code"


@situation("prompt.json of somebody else's adapter with code in place of numbers, and quotes in its texts")
def code_in_prompt(place: Place) -> str:
    lora = place.folder / "lora"
    shutil.copytree(place.finished, lora)
    facts = json.loads((lora / "prompt.json").read_text())
    (lora / "prompt.json").write_text(json.dumps(facts | {"max_new_tokens": '9); import os; os.system("id"'}))
    for name in ("manifest.json", "manifest.sha256"):
        (lora / name).unlink()
    words = ("export", "--adapter", lora, "--output_dir", place.folder / "out")
    told = place.run(*words, code=2)
    template = "'''\n```\n{question}\"\\ "
    (lora / "prompt.json").write_text(json.dumps(facts | {"template": template, "own_template": template}))
    place.run(*words)
    text = (place.folder / "out" / "README.md").read_text()
    code = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert code is not None
    assert template in [node.value for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Constant)]
    return line_with(told, "max_new_tokens")[:150]


@situation("cells like =HYPERLINK(…), +1, -1, @SUM in questions and answers; data export --format csv")
def formulas_in_exported_data(place: Place) -> str:
    data = place.data(question='=HYPERLINK("http://evil","x")', answer="@SUM(A1)")
    told = place.run("data", "export", data, "--format", "csv", "--output", place.folder / "out")
    rows = list(csv.DictReader((place.folder / "out" / "train.csv").open(encoding="utf-8")))
    assert rows[0]["question"] == '=HYPERLINK("http://evil","x")'  # data are never changed
    place.run("data", "import", place.folder / "out", "--format", "csv", "--output", place.folder / "in")
    again = json.loads((place.folder / "in" / "train.jsonl").read_text().splitlines()[0])
    assert again["answer"] == "@SUM(A1)"
    return line_with(told, "warning:", "formula")


@situation("a run's folder called =cmd|' /C calc'!A0; report --export")
def formulas_in_tables(place: Place) -> str:
    run = place.folder / "=cmd|' C calc'!A0"
    shutil.copytree(place.finished, run)
    place.run("report", run, "--export", place.folder / "figures")
    cells = [
        cell for path in (place.folder / "figures").glob("*.csv") for row in csv.reader(path.open()) for cell in row
    ]
    assert any(cell.startswith("'=cmd") for cell in cells) and not any(cell.startswith("=") for cell in cells)
    return "the cell begins with an apostrophe"


@situation("markup and quotes in the names of runs and benchmarks; SVG figures of report --export")
def markup_in_figures(place: Place) -> str:
    runs = [place.folder / f"a {NAME}", place.folder / 'b "&lt;]]>']
    for run in runs:
        shutil.copytree(place.finished, run)
    place.run("report", *runs, "--export", place.folder / "figures")
    drawn = sorted((place.folder / "figures").glob("*.svg"))
    for path in drawn:
        assert all(
            element.tag.rpartition("}")[2] not in ("script", "img") for element in ElementTree.parse(path).iter()
        )
    return f"{len(drawn)} figures are well formed, without foreign elements"


@situation(
    "terminal escapes, C1 controls, right-to-left overrides in texts and names of files; every command that prints them"
)
def escapes_on_the_terminal(place: Place) -> str:
    odd = place.folder / f"own{ESCAPES}"
    rows = [
        {
            "image": f"{n}.png",
            "question": f"Which?{ESCAPES}",
            "answer": f"red{ESCAPES}",
            "id": f"{n}{ESCAPES}",
            "split": ("train", "validation", "test")[n % 3],
        }
        for n in range(6)
    ]
    rows.append({"image": f"gone{ESCAPES}.png", "question": "Q?", "answer": "a", "split": "train"})
    data = place.data(odd.name, rows)
    run, few = place.folder / f"run{ESCAPES}", ("--max_left_out", "0.5")
    told = [
        place.run("data", "check", data, "--split", "all", "--output_dir", place.folder / "check", *few),
        place.run("data", "check", data, "--output_dir", place.folder / "check", code=2),
        place.run(*place.train(data, run, "--eval_benchmarks", data, *few)),
        place.evaluate(run, data, place.folder / f"e{ESCAPES}", *few),
        place.run("ask", data / "1.png", f"Which?{ESCAPES}", "--adapter", run),
        place.run("compare", run, run),
        place.run("report", run, place.folder / f"no{ESCAPES}", code=2),
        place.run("data", "export", data, "--format", "csv", "--output", place.folder / f"x{ESCAPES}", *few),
        place.run("train", f"--{ESCAPES}", code=2),
        place.run("data", "cache", "clear", "--older_than", ESCAPES, code=2),
    ]
    raw = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
    bad = [match.string[max(0, match.start() - 200) : match.end() + 40] for text in told if (match := raw.search(text))]
    assert not bad, (len(bad), bad)
    assert "\\u001b[31m" in told[2]
    return f"written as \\u001b by all of {len(told)} commands"

"""What a message proposes is carried out: every `fix:` and `next:` line that is a command, or a flag to add, works.

And a command that failed before it did anything leaves nothing, so that the corrected line goes through.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import vlm_sft
from tests.adapters import save_adapter, save_base
from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.cli.parser import VERBS, build_parser
from vlm_sft.common.manifest import write_manifest

SHORT = [
    "--max_steps",
    "2",
    "--global_batch_size",
    "2",
    "--bf16",
    "false",
    "--eval_strategy",
    "no",
    "--save_strategy",
    "no",
    "--max_eval",
    "2",
]
PLACES = {"IMAGE": "a.png", "QUESTION": "How many?", "SETS": "own.jsonl", "DIR": "evaluated", "FOLDER": "again"}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, own data with one unusable row of twelve, an adapter, a picture; the folder has a space in its name."""
    folder = tmp_path_factory.mktemp("a place")
    save_adapter(save_base(folder / "base"), folder / "lora")
    rows = []
    for number in range(12):
        name = f"{number}.png"
        (folder / name).write_bytes(png((number * 20, 9, 9), (40, 30)))
        split = ("train", "train", "validation", "test")[number % 4]
        rows.append({"image": name, "question": f"Q{number}?", "answer": str(number), "split": split})
    rows.append({"image": "0.png", "question": "Q?", "answer": "", "split": "train"})
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    (folder / "flawed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(folder / "3.png", folder / "a.png")
    return folder


@pytest.fixture
def place(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test, with the things in it."""
    work = tmp_path / "work folder"
    shutil.copytree(things, work)
    monkeypatch.chdir(work)
    return work


def train(output: str, *flags: str, base: str = "base", data: str = "own.jsonl") -> list[str]:
    return ["train", "--base_model", base, "--dataset", data, "--output_dir", output, *SHORT, *flags]


def commands_in(text: str) -> list[list[str]]:
    """The vlm-sft commands of a message, with the places that the reader is to fill filled."""
    found = []
    for line in re.findall(r"vlm-sft ((?:'[^']*'|\"[^\"]*\"|[^'\",;)\n])+)", text):
        words = [PLACES.get(word, word) for word in shlex.split(line.split("  #")[0])]
        found.append(words)
    return found


def told(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    return output.out + output.err


def succeed(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code, text = main(line), told(capsys)
    assert code == 0, f"{shlex.join(line)}:\n{text}"
    return text


FAILING = {
    "no such base": train("out/run", base="nowhere"),
    "an adapter as base": train("out/run", base="lora"),
    "no such data": train("out/run", data="nowhere.jsonl"),
    "no such benchmark": train("out/run", "--eval_benchmarks", "nonesuch"),
    "a target that is not there": train("out/run", "--target_modules", "nonesuch"),
    "a projector that is not wanted": train("out/run", "--prompt_template", "no place for it"),
    "a report to nowhere": train("out/run", "--guard", "nonesuch:1"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_failed_start_leaves_nothing(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FAILING[kind]) == 2
    text = told(capsys)
    assert "error: " in text and not (place / "out").exists(), text
    succeed(train("out/run", "--eval_benchmarks", "none"), capsys)
    assert (place / "out" / "run" / "adapter_model.safetensors").is_file()


def test_a_failed_start_touches_nothing_that_was_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out").mkdir()
    for name in ("notes.txt", "data.json"):
        (place / "out" / name).write_text("mine")
    assert main(train("out", "--target_modules", "nonesuch")) == 2
    assert sorted(path.name for path in (place / "out").iterdir()) == ["data.json", "notes.txt"]


def test_what_a_killed_start_left_does_not_block(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out").mkdir()
    for name, text in {"run.json": '{"schema": 1, "status": "running"}', ".lock": "", "recipe.json": "{}"}.items():
        (place / "out" / name).write_text(text)
    succeed(train("out", "--eval_benchmarks", "none"), capsys)


@pytest.mark.parametrize("work", ["metrics.jsonl", "checkpoint-1", "demo/predictions.rank0.jsonl", "model.safetensors"])
def test_work_is_protected(work: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "out" / work
    path.parent.mkdir(parents=True)
    path.mkdir() if work.startswith("checkpoint") else path.write_text("work")
    (place / "out" / "run.json").write_text('{"schema": 1, "status": "interrupted"}')
    before = {path: path.is_file() and path.read_bytes() for path in (place / "out").rglob("*")}
    assert main(train("out")) == 2 and "holds another run" in told(capsys)
    assert {path: path.is_file() and path.read_bytes() for path in (place / "out").rglob("*")} == before


@pytest.mark.parametrize(
    "line",
    [
        train("out", data="flawed.jsonl"),
        ["eval", "--base_model", "base", "--benchmark", "flawed.jsonl", "--split", "train", "--output_dir", "out"],
        ["data", "import", "flawed.jsonl", "--format", "jsonl", "--output", "out"],
        ["data", "export", "flawed.jsonl", "--format", "csv", "--output", "out"],
        ["data", "check", "flawed.jsonl", "--output_dir", "out"],
    ],
    ids=["train", "eval", "import", "export", "check"],
)
def test_the_limit_that_is_proposed_goes_through(
    line: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 2
    text = told(capsys)
    fix = re.search(r"(out/left_out\.jsonl), or allow it with (--max_left_out [0-9.]+)", text)
    assert fix and "empty answer" in (place / fix[1]).read_text(), text
    if line[1] != "check":
        assert {path.name for path in (place / "out").iterdir()} <= {"left_out.jsonl", "data.json"}
    succeed([*line, *fix[2].split()], capsys)


@pytest.mark.parametrize(
    "line",
    [
        ["eval", "--base_model", "base", "--benchmark", "nowhere.jsonl", "--output_dir", "out/deep/eval"],
        ["eval", "--base_model", "nowhere", "--benchmark", "own.jsonl", "--output_dir", "out/deep/eval"],
        ["export", "--adapter", "nowhere", "--output_dir", "out/deep/export"],
        ["data", "import", "nowhere.jsonl", "--format", "jsonl", "--output", "out/deep/import"],
        ["data", "import", "broken.json", "--format", "jsonl", "--output", "out/deep/import"],
        ["data", "export", "nowhere.jsonl", "--format", "csv", "--output", "out/deep/export"],
        ["data", "check", "nowhere.jsonl", "--output_dir", "out/deep/check"],
        ["compare", "nowhere", "base", "--output_dir", "out/deep/compare"],
        ["report", "nowhere", "--output", "out/deep/report.html"],
        ["report", "nowhere", "--export", "out/deep/figures"],
        ["plan", "--base_model", "nowhere", "--dataset", "own.jsonl", "--output", "out/deep/plan.json"],
        ["score", "--benchmark", "chartqa", "--predictions", "nowhere", "--per_item", "out/deep/items.jsonl"],
        ["verify", "base", "--output_dir", "out/deep/verify"],
    ],
    ids=lambda line: " ".join(line[:3]),
)
def test_other_commands_leave_nothing(line: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "broken.json").write_text('[{"image": ')
    assert main(line) == 2
    assert "Traceback" not in told(capsys) and not (place / "out").exists()


def test_the_next_lines_of_a_training_and_what_follows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = succeed(train("runs/my run", "--eval_benchmarks", "own.jsonl"), capsys)
    run = place / "runs" / "my run"
    adapter = save_adapter(place / "base", place / "moved")  # two steps change next to nothing, and an export says so
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapter / name, run / name)
    write_manifest(run, ["adapter_model.safetensors", "adapter_config.json"], {})
    ask, page, export = commands_in(text[text.index("next: ") :])
    assert (ask[0], page[0], export[0]) == ("ask", "demo", "export")
    build_parser("demo").parse_args(page)
    asked = succeed(ask, capsys)
    exported = succeed([*export, "--questions", "1"], capsys)
    measure, demo = commands_in(asked[asked.index("next: ") :])
    build_parser("demo").parse_args(demo)
    evaluated = succeed(measure, capsys)
    base = [word for word in measure if word not in ("--adapter", "runs/my run")]
    succeed(["OTHER" if word == "evaluated" else word for word in base], capsys)
    (compare,) = commands_in(evaluated[evaluated.index("next: ") :])
    succeed(compare, capsys)
    (again,) = commands_in(exported[exported.index("next: ") :])[:1]
    succeed(again, capsys)


def test_the_next_lines_of_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = succeed(["data", "import", "own.jsonl", "--format", "jsonl", "--output", "my data"], capsys)
    check, first = commands_in(text[text.index("next: ") :])
    checked = succeed(check, capsys)
    small = ["--base_model", "base", *SHORT, "--eval_benchmarks", "none"]
    succeed([*first, *small], capsys)
    (second,) = commands_in(checked[checked.index("next: ") :])
    succeed([*second, *small], capsys)
    for layout in ("csv", "jsonl"):
        text = succeed(["data", "export", "my data", "--format", layout, "--output", f"as {layout}"], capsys)
        (line,) = commands_in(text[text.index("next: ") :])
        shutil.rmtree("outputs", ignore_errors=True)
        succeed([*line, *(small if layout == "jsonl" else [])], capsys)


def test_the_next_line_of_a_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = train("out", "--eval_benchmarks", "none")
    assert "next: the same flags with vlm-sft train" in succeed(["plan", *flags[1:]], capsys)
    succeed(flags, capsys)


def test_the_way_out_of_an_adapter_as_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "a.png", "How many?", "--base_model", "lora"]) == 2
    (line,) = commands_in(told(capsys))
    succeed([*line, "--questions", "1"], capsys)
    succeed(["ask", "a.png", "How many?", "--base_model", "lora-merged"], capsys)
    succeed(["ask", "a.png", "How many?", "--base_model", "base", "--adapter", "lora"], capsys)


def texts(path: Path) -> list[str]:
    """The texts of a module, with X in the place of what is filled in, docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inside | documents):
            found.append(node.value)
    return [text for text in found if "vlm-sft " in text]


def flags_of(verb: str, rest: str) -> dict[str, argparse.Action]:
    """The flags of a verb, or of its action, by their long names."""
    child = build_parser(verb)
    for word in [verb, *(word for word in rest.split()[:1] if verb == "data")]:
        actions = next(one for one in child._actions if isinstance(one, argparse._SubParsersAction))
        child = actions.choices[word]
    return {option: action for action in child._actions for option in action.option_strings if option[:2] == "--"}


def test_every_command_that_is_printed_has_flags_that_exist() -> None:
    """All of them, whatever the way to their message, and all flags that the verb cannot do without."""
    checked = 0
    for path in Path(vlm_sft.__file__).parent.rglob("*.py"):
        for text in texts(path):
            for verb, rest in re.findall(rf"vlm-sft ({'|'.join(VERBS)})\b((?: (?:[^,;)`\n]|,(?! ))*)?)", text):
                actions = flags_of(verb, rest)
                flags = [flag for flag in re.findall(r"--[a-z_]+", rest) if flag != "--help"]
                for flag in flags:
                    assert flag in actions, f"{path.name}: {verb} has no {flag}: {text}"
                needed = [name for name, action in actions.items() if action.required] if flags else []
                filled = re.search(r"(?<![a-z] )\bX\b", rest)  # a part that may hold flags
                for flag in needed:
                    assert flag in flags or "…" in rest or filled, f"{path.name}: {verb} needs {flag}: {text}"
                checked += len(flags)
    assert checked >= 15

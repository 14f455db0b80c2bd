"""Data of other programs, and what is no data: one refusal for every reader, in few words, through the CLI."""

from __future__ import annotations

import base64
import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pictures import png
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.data.sources.registry import SPLITS, load_split, parse_datasets

Captured = pytest.CaptureFixture[str]


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures in the working folder."""
    monkeypatch.chdir(tmp_path)
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def check(name: str, *flags: str) -> int:
    return main(["data", "check", name, "--split", "all", "--output_dir", "check", *flags])


def reasons(folder: str) -> list[tuple[str, str]]:
    lines = Path(folder, "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [(item["reason"], item["detail"]) for item in map(json.loads, lines)]


def large_picture() -> str:
    """A PNG of 120 kB as base64."""
    Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(120_000)).save("noise.png")
    return base64.b64encode(Path("noise.png").read_bytes()).decode("ascii")


def talk(question: str, answer: str = "a", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["red.png"]} | more


PLAIN = {"image": "red.png", "question": "q?", "answer": "red"}
OTHER = {"image": "blue.png", "question": "q?", "answer": "blue"}
CALL = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a", "tool_calls": [{"name": "t"}]}]
THOUGHT = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a", "channel": "analysis"}]
REFUSED = [
    (PLAIN | {"video": "x.mp4"}, "video"),
    (talk("<image>q", videos=["x.mp4"]), "video"),
    (talk("<image>q", audios=["x.wav"]), "record with audios"),
    (talk("<image>q", tools=[{"name": "t"}]), "record with tools"),
    (talk("<image>q", tools='[{"name": "t"}]'), "record with tools"),
    (talk("<image>where?", objects={"ref": ["cup"], "bbox": [[1, 2, 3, 4]]}), "record with objects"),
    (talk("<image>where is <ref-object>?"), "unknown mark"),
    (talk("<image>where?", "<bbox>"), "unknown mark"),
    (talk("<video><image>q"), "video"),
    (talk("<audio><image>q"), "unknown mark"),
    (talk("<image>q", rejected_response="b"), "preference record"),
    (PLAIN | {"chosen": "a", "rejected": "b"}, "preference record"),
    (talk("<image>q", kto_tag=False), "preference record"),
    (talk("<image>q", label=False), "preference record"),
    ({"messages": CALL, "images": ["red.png"]}, "record with tool_calls"),
    ({"messages": THOUGHT, "images": ["red.png"]}, "record with channel"),
    (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<video>q"}]}],
            "completion": "a",
            "images": ["red.png"],
        },
        "video",
    ),
]
TAKEN = [
    talk(
        "<image>q",
        videos=[],
        audio=None,
        tools="[]",
        objects={"ref": [], "bbox": []},
        rejected_response="",
        rejected_messages=[],
    ),
    PLAIN | {"id": 7, "source": "web", "difficulty": 2, "meta": {"video": "x"}, "bbox": [1, 2], "label": True},
    talk("<image>q", "It is the <video> element.", channel="charts"),
    talk("<image>What does <img> do?"),
]


@pytest.mark.parametrize("record, reason", REFUSED, ids=[f"{number}-{case[1]}" for number, case in enumerate(REFUSED)])
def test_what_the_import_refuses_training_and_check_refuse_too(
    record: dict[str, Any], reason: str, folder: Path, capsys: Captured
) -> None:
    source = write("set.jsonl", [record, PLAIN, OTHER])
    assert check(source, "--max_left_out", "1") == 0
    named = reasons("check")
    assert [found for found, _ in named] == [reason]
    for layout in ("trl", "msswift", "jsonl"):
        assert main(["data", "import", source, "--format", layout, "--output", layout, "--max_left_out", "1"]) == 0
        assert reasons(layout) == named
    write("alone.jsonl", [record])
    assert main(["train", "--base_model", "pocket", "--dataset", "alone.jsonl", "--output_dir", "run"]) == 2
    assert f"{reason}: alone.jsonl line 1: {named[0][1].partition(': ')[2]}" in capsys.readouterr().err


def test_empty_keys_and_metadata_are_no_reason(folder: Path) -> None:
    source = write("set.jsonl", [*TAKEN, OTHER])
    assert check(source) == 0 and reasons("check") == []
    assert main(["data", "import", source, "--format", "msswift", "--output", "out"]) == 0


def test_parquet_rows_are_refused_alike(folder: Path) -> None:
    table = {
        "image": [png("red"), png("blue"), png("green")],
        "question": ["q", "r", "s"],
        "answer": ["a", "b", "c"],
        "videos": [["x.mp4"], [], None],
        "tools": [None, None, "[]"],
    }
    pq.write_table(pa.table(table), "set.parquet")
    assert check("set.parquet", "--max_left_out", "1") == 0
    assert [reason for reason, _ in reasons("check")] == ["video"]


def test_dataset_info_may_call_a_preference_by_another_name(folder: Path, capsys: Captured) -> None:
    write(
        "set.jsonl",
        [
            {
                "conversations": [{"from": "human", "value": "<image>q"}],
                "better": {"value": "a"},
                "worse": {"value": "b"},
                "images": ["red.png"],
            }
        ],
    )
    columns = {"messages": "conversations", "chosen": "better", "rejected": "worse"}
    Path("dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "set.jsonl", "columns": columns}}))
    assert main(["data", "import", "set.jsonl", "--format", "llamafactory", "--output", "out"]) == 2
    assert "preference record: set.jsonl line 1: better" in capsys.readouterr().err


def test_bare_base64_is_a_picture_and_never_printed(folder: Path, capsys: Captured) -> None:
    text = large_picture()
    bare = [
        {"image": text},
        {"image": {"path": text}},
        {"images": [text + " "]},
        {"image": f"base64,{text}"},
        {"image": text.replace("+", "-").replace("/", "_").rstrip("=")},
        {"image": "\n".join(text[start : start + 76] for start in range(0, len(text), 76))},
    ]
    broken = [
        {"image": "/9j/" + text},  # the beginning of a JPEG, which also begins like an absolute path
        {"image": text[: len(text) // 2]},
        {"image": text + "?"},
        {"image": {"bytes": text[:-8] + "?" * 8}},
    ]
    rows = [{"question": f"q{number}", "answer": "a", **row} for number, row in enumerate(bare + broken)]
    source = write("set.jsonl", [*rows, PLAIN, OTHER])
    samples = [sample for split in SPLITS for sample in load_split(parse_datasets(source)[0], split).samples]
    pictures = {sample.question: sample.images[0].load() for sample in samples}
    assert {pictures[f"q{number}"] for number in range(len(bare))} == {base64.b64decode(text)}
    assert check(source, "--max_left_out", "0.9") == 0
    found = {detail.partition(": ")[0]: reason for reason, detail in reasons("check")}
    first = len(bare) + 1
    assert found == {f"set.jsonl line {n}": "image cannot be read" for n in range(first, first + len(broken))}
    said = "".join(capsys.readouterr()) + Path("check", "left_out.jsonl").read_text()
    assert len(said) < 8000 and text[100:200] not in said


LONG = "x" * 100_000
HOSTILE = [
    {"messages": [{"role": LONG, "content": "a"}]},
    {LONG: 1, "question": "q"},
    PLAIN | {"image": LONG},
    PLAIN | {"image": "http://" + LONG},
    PLAIN | {"image": "data:" + LONG},
    {"messages": [{"role": "user", "content": [{"type": LONG}]}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": [LONG]}, {"role": "assistant", "content": "a"}]},
    PLAIN | {"id": LONG, "image": "gone.png"},
    {"messages": THOUGHT[:1] + [THOUGHT[1] | {"channel": "analysis", "content": LONG}], "images": ["red.png"]},
]


@pytest.mark.parametrize("record", HOSTILE, ids=range(len(HOSTILE)))
def test_no_message_grows_with_what_it_quotes(record: dict[str, Any], folder: Path, capsys: Captured) -> None:
    assert check(write("set.jsonl", [record])) == 2
    assert main(["data", "import", "set.jsonl", "--format", "jsonl", "--output", "out"]) == 2
    told = capsys.readouterr().err
    assert len(told) < 5000 and "fix: " in told


@pytest.mark.parametrize(
    "line",
    [
        ["data", "check", LONG],
        ["data", "check", f"chartqa:{LONG}"],
        ["data", "check", f"mine@{LONG}"],
        ["ask", LONG, "q"],
        ["score", "--benchmark", "chartqa", "--predictions", LONG],
        ["verify", LONG],
        ["train", "--base_model", "pocket", "--output_dir", "run", "--sft_config", LONG],
        ["train", "--base_model", "pocket", "--output_dir", "run", "--guard", LONG],
        ["train", "--base_model", "pocket", "--output_dir", LONG, "--dataset", "demo_charts"],
        ["eval", "--base_model", LONG, "--benchmark", "demo_charts", "--output_dir", "run"],
        [
            "eval",
            "--base_model",
            "pocket",
            "--benchmark",
            "demo_charts",
            "--output_dir",
            "run",
            "--max_new_tokens",
            LONG,
        ],
        ["report", LONG],
        ["compare", LONG, LONG],
        ["data", "import", LONG, "--format", "csv", "--output", "out"],
        ["data", "import", "red.png", "--format", "csv", "--output", "out", "--columns", LONG],
    ],
    ids=lambda line: f"{line[0]}-{len(line)}-{line[-2][:12]}",
)
def test_no_flag_is_told_at_its_full_length(line: list[str], folder: Path, capsys: Captured) -> None:
    assert main(line) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and len(told) < 5000


def test_keys_under_other_names_are_named_with_the_flag_that_reads_them(folder: Path, capsys: Captured) -> None:
    rows = [{"picture": f"{colour}.png", "question": "q?", "answer": colour} for colour in ("red", "blue")]
    source = write("set.jsonl", rows)
    assert check(source) == 2
    told = capsys.readouterr().err
    assert "answer, picture, question" in told and "--columns image=picture" in told
    flag = next(part for part in told.splitlines() if "name it: " in part).partition("name it: ")[2]
    assert main(["data", "import", source, "--format", "jsonl", "--output", "out", *flag.split()]) == 0
    assert check("out") == 0
    write("other.jsonl", [{"image": "red.png", "frage": "q?", "antwort": "a"}] * 2)
    assert check("other.jsonl") == 2
    assert "antwort, frage, image" in capsys.readouterr().err
    marked = talk("<image>q", picture="red.png")
    del marked["images"]
    assert check(write("marked.jsonl", [marked])) == 2
    assert "messages, picture" in capsys.readouterr().err
    assert main(["data", "import", "marked.jsonl", "--format", "msswift", "--output", "m"]) == 2
    assert "--columns image=picture" in capsys.readouterr().err
    assert check(write("marked.jsonl", [talk("<image><image>q")])) == 2
    assert "<image> 2 times, 1 images" in capsys.readouterr().err


def test_a_folder_of_images_that_no_record_needs_is_refused(folder: Path, capsys: Captured) -> None:
    text = base64.b64encode(png("red")).decode()
    inside = {"image": f"data:image/png;base64,{text}", "question": "q", "answer": "a"}
    line = ["data", "import", write("set.jsonl", [inside]), "--format", "jsonl", "--images", "."]
    assert main([*line, "--output", "out"]) == 2
    assert "--images . has no effect" in capsys.readouterr().err and not list(Path().glob("out/*.jsonl"))
    write("set.jsonl", [inside, PLAIN])
    assert main([*line, "--output", "out"]) == 0
    pq.write_table(
        pa.table({"image": [{"bytes": None, "path": "red.png"}], "question": ["q"], "answer": ["a"]}), "set.parquet"
    )
    Path("elsewhere").mkdir()
    Path("red.png").rename("elsewhere/red.png")  # a table that holds paths only
    assert main(["data", "import", "set.parquet", "--format", "trl", "--images", "elsewhere", "--output", "p"]) == 0


@pytest.mark.parametrize("layout", ["jsonl", "trl", "msswift"])
def test_columns_name_keys_of_every_layout(layout: str, folder: Path) -> None:
    pq.write_table(
        pa.table({"photo": [{"bytes": png("red"), "path": None}], "frage": ["q"], "antwort": ["a"]}), "set.parquet"
    )
    flags = ["--format", layout, "--columns", "image=photo, question=frage,answer=antwort"]
    assert main(["data", "import", "set.parquet", *flags, "--output", "out"]) == 0
    row = json.loads(Path("out", "train.jsonl").read_text())
    assert (row["question"], row["answer"]) == ("q", "a") and Path("out", row["image"]).read_bytes() == png("red")


def test_columns_of_llamafactory_and_of_talks(folder: Path) -> None:
    write("set.jsonl", [{"talk": talk("<image>q")["messages"], "bild": "red.png"}])
    pairs = (("llamafactory", "image"), ("llamafactory", "images"), ("trl", "images"), ("msswift", "image"))
    for layout, name in pairs:
        out = f"out_{layout}_{name}"
        flags = ["--format", layout, "--columns", f"messages=talk,{name}=bild", "--output", out]
        assert main(["data", "import", "set.jsonl", *flags]) == 0
        assert json.loads(Path(out, "train.jsonl").read_text())["question"] == "q"


@pytest.mark.parametrize(
    "layout, columns, told",
    [
        ("jsonl", "imag=photo", "nothing is called 'imag'; did you mean image?"),
        ("csv", "questoin=frage", "nothing is called 'questoin'; did you mean question?"),
        ("trl", "query=frage", "nothing is called 'query'"),
        ("llamafactory", "id=photo", "nothing is called 'id'"),
        ("jsonl", "image=photo,split=part", "no record of set.jsonl has the key 'part'"),
        ("msswift", "image=photo,image=other", "image is named twice"),
        ("jsonl", "image", "not NAME=COLUMN"),
        ("jsonl", "", "not NAME=COLUMN"),
    ],
)
def test_columns_without_effect_are_refused(
    layout: str, columns: str, told: str, folder: Path, capsys: Captured
) -> None:
    write("set.jsonl", [{"photo": "red.png", "question": "q", "answer": "a"}])
    Path("set.csv").write_text("photo,frage,answer\nred.png,q,a\n")
    source = "set.csv" if layout == "csv" else "set.jsonl"
    assert main(["data", "import", source, "--format", layout, "--columns", columns, "--output", "out"]) == 2
    assert told in capsys.readouterr().err and not list(Path().glob("out/*.jsonl"))


def test_parts_of_a_content_say_what_is_wrong_with_them(folder: Path, capsys: Captured) -> None:
    for part, told in (
        ({"type": "text", "text": None}, "a part of the type text whose text is null; write it"),
        ({"type": "text", "content": "q"}, "whose text is missing; its keys are: content, type"),
        ({"type": "text", "text": 3}, "whose text is no text but 3"),
        ({"text": "q"}, "a part without a type; its keys are: text"),
        ("q", "a part that is not an object: 'q'"),
    ):
        record = {
            "messages": [{"role": "user", "content": [{"type": "image"}, part]}, {"role": "assistant", "content": "a"}],
            "images": ["red.png"],
        }
        assert check(write("set.jsonl", [record])) == 2
        assert told in capsys.readouterr().err


def test_a_broken_csv_row_costs_no_other_row(folder: Path, capsys: Captured) -> None:
    Path("set.csv").write_text(
        "image,question,answer\n"
        'red.png,"How many,3\n'  # never closed
        'blue.png,"Colour?",blue\n'
        ' red.png ,"say ""x"",\nplease", green \n'  # a sound cell over two lines; spaces around a file's name
        'red.png,"5" screen",y\n'
        "red.png,only two\n"
        "\n"
        'red.png,"to the end,b\n'
        "blue.png,last?,yes\n"
    )
    assert main(["data", "import", "set.csv", "--format", "csv", "--output", "out", "--max_left_out", "0.6"]) == 0
    rows = [json.loads(line) for line in Path("out", "train.jsonl").read_text().splitlines()]
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("Colour?", "blue"),
        ('say "x",\nplease', "green"),
        ("last?", "yes"),
    ]
    found = reasons("out")
    assert [detail.partition(":")[0] for _, detail in found] == [f"set.csv line {n}" for n in (2, 6, 7, 9)]
    assert {reason for reason, _ in found} == {"broken CSV row"} and 'a quote inside of one as ""' in found[0][1]
    assert main(["data", "import", "set.csv", "--format", "csv", "--output", "strict"]) == 2  # four of seven
    Path("set.csv").write_text('image,"question,answer\nred.png,q,a\n')
    assert main(["data", "import", "set.csv", "--format", "csv", "--output", "no"]) == 2
    assert "the first line, which names the columns" in capsys.readouterr().err
    Path("set.csv").write_text("image,question,question,answer\nred.png,q,r,a\n")
    assert main(["data", "import", "set.csv", "--format", "csv", "--output", "no"]) == 2
    assert "several columns called 'question'" in capsys.readouterr().err


def test_large_cells_and_bare_base64_of_a_table(folder: Path, capsys: Captured) -> None:
    text = large_picture()
    assert len(text) > 128 * 1024  # Python's own limit of a cell
    header = ["index", "image", "question", "A", "answer"]
    for name, mark in (("good.csv", ","), ("bare.tsv", "\t")):
        prefix = "data:image/png;base64," if name == "good.csv" else ""
        with open(name, "w", newline="") as stream:
            csv.writer(stream, delimiter=mark).writerows([header, ["1", prefix + text, "What?", "a cat", "A"]])
        output = name.partition(".")[0]
        assert main(["data", "import", name, "--format", "csv", "--output", output]) == 0
        assert line_with(capsys.readouterr().out, "reading image, question, answer;", "not read: index, A")
        row = json.loads(Path(output, "train.jsonl").read_text())
        assert Path(output, row["image"]).read_bytes() == base64.b64decode(text)
    assert check("bare.tsv") == 0 and check("bare") == 0

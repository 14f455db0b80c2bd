"""Unusual records and pictures, and data that changes between stop and resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.faults.situations.place import Place, Stage
from tests.pictures import encoded, png
from tests.wording import line_with

situation = Stage("records and pictures")
FEW = ("--max_left_out", "0.9")


def checked(place: Place, data: Path, *more: str) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """What data check prints, data.json and left_out.jsonl."""
    folder = place.folder / "check"
    told = place.run("data", "check", data, "--split", "all", "--output_dir", folder, *FEW, *more)
    left = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    return told, json.loads((folder / "data.json").read_text()), left


def _changed(place: Place, change: Callable[[Path], None]) -> str:
    """Data that was changed while a training stood still is refused at the resume, and can be allowed."""
    data, run = place.data(), place.folder / "run"
    place.stop_after_two(data, run)
    change(data)
    told = place.run(*place.train(data, run, "--resume", "auto"), code=2)
    place.run(*place.train(data, run, "--resume", "auto", "--allow_changes"))
    assert "data: images, questions, answers or their order differ" in told, told[-1500:]
    return " ".join(told[told.index("error:") : told.index("  fix:")].split()).replace(str(place.folder), "…")


def _rewrite(data: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = data / "data.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@situation("one answer edited between stop and resume")
def answer_edited(place: Place) -> str:
    return _changed(place, lambda data: _rewrite(data, lambda rows: [rows[0] | {"answer": "other"}, *rows[1:]]))


@situation("one image replaced between stop and resume, under its name and with its size")
def image_edited(place: Place) -> str:
    return _changed(place, lambda data: (data / "0.png").write_bytes(png((9, 8, 7), (56, 70))) and None)


@situation("records put in another order between stop and resume")
def rows_reordered(place: Place) -> str:
    return _changed(place, lambda data: _rewrite(data, lambda rows: rows[::-1]))


@situation("a record added between stop and resume")
def row_added(place: Place) -> str:
    return _changed(place, lambda data: _rewrite(data, lambda rows: [*rows, rows[0] | {"question": "New?"}]))


@situation("only a question of the validation part edited between stop and resume")
def validation_edited(place: Place) -> str:
    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"question": "Other?"} if row["split"] == "validation" else row for row in rows]

    return _changed(place, lambda data: _rewrite(data, edit))


@situation("only the accepted answers of a validation question edited between stop and resume")
def accepted_answers_edited(place: Place) -> str:
    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"answers": [row["answer"], "x"]} if row["split"] == "validation" else row for row in rows]

    return _changed(place, lambda data: _rewrite(data, edit))


@situation("JSON lines with CRLF, a byte order mark and NUL bytes; one file in UTF-16")
def line_ends_and_marks(place: Place) -> str:
    data = place.data()
    text = (data / "data.jsonl").read_text()
    (data / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\0\0\r\n")
    _, facts, left = checked(place, data)
    assert facts["samples"] == 16 and len(left) == 1, left
    (data / "data.jsonl").write_bytes(text.encode("utf-16"))
    told = place.run("data", "check", data, "--output_dir", place.folder / "c2", code=2)
    return f"16 of 16 read, {left[0]['reason']} named; UTF-16: {line_with(told, 'UTF')[:160]}".replace(
        str(place.folder), "…"
    )


@situation("ids that come twice, are empty, huge, or hold .. and slashes")
def odd_ids(place: Place) -> str:
    ids = ["a", "a", "", " ", "../../x", "/etc", "x" * 5000, 7, 7.5, None, True, ["a"]]
    rows = [{"image": f"{n % 8}.png", "question": f"Q{n}?", "answer": "a", "id": own} for n, own in enumerate(ids)]
    _, facts, left = checked(place, place.data(rows=rows))
    assert facts["samples"] == len(ids) and not left
    place.run("data", "export", place.folder / "own", "--format", "jsonl", "--output", place.folder / "out")
    names = [json.loads(line)["id"] for path in (place.folder / "out").glob("t*.jsonl") for line in path.open()]
    assert len(set(names)) == len(names)
    return f"{len(ids)} questions, all kept, under different ids"


@situation("an empty file, a file of empty lines, an empty folder, `[]`, `{}`")
def nothing_there(place: Place) -> str:
    for number, text in enumerate(("", "\n\n \n", None, "[]", "{}")):
        folder = place.folder / f"n{number}"
        folder.mkdir()
        if text is not None:
            (folder / "data.jsonl").write_text(text)
        for words in (
            ("data", "check", folder, "--output_dir", place.folder / "c"),
            place.train(folder, place.folder / "r"),
        ):
            told = place.run(*words, code=2)
            line_with(told, "error:")
        assert not (place.folder / "r").exists()
    return "refused by name in both commands, nothing is left behind"


@situation("a data set of one question; train with and without --eval_benchmarks")
def one_question(place: Place) -> str:
    data = place.data(rows=[{"image": "0.png", "question": "Q?", "answer": "a"}])
    told = place.run(*place.train(data, place.folder / "run"), code=2)
    for name in ("train", "val"):
        shutil.copy(data / "data.jsonl", data / f"{name}.jsonl")
    (data / "data.jsonl").unlink()
    place.run(*place.train(data, place.folder / "run"))
    return line_with(told, "error:").replace(str(place.folder), "…")


@situation(
    "answers of white space, zero-width spaces, emoji, right-to-left text, combining marks, a 20,000-character one"
)
def odd_answers(place: Place) -> str:
    answers = ["   ", "\u200b", "\u3000", "👨‍👩‍👧‍👦🏳️‍🌈", "שלום 12 עולם", "Z̸̛͑a", "a" * 20_000, "ﷺ", "\t1\t"]
    rows = [{"image": f"{n % 8}.png", "question": "Q?", "answer": answer} for n, answer in enumerate(answers)]
    data = place.data(rows=rows * 2)
    _, facts, left = checked(place, data, "--base_model", "pocket")
    reasons = {item["reason"] for item in left}
    assert facts["samples"] + len(left) == 2 * len(answers), (facts, left)
    place.run(*place.train(data, place.folder / "run", *FEW))
    return f"{facts['samples'] // 2} of {len(answers)} kinds are used; left out: {', '.join(sorted(reasons))}"


@situation("numbers as answers: 1e400, -0.0, 10**5000, NaN, Infinity, true, null, a list, 0.1 + 0.2")
def odd_numbers(place: Place) -> str:
    words = [
        "1e400",
        "-0.0",
        "1" + "0" * 5000,
        "NaN",
        "Infinity",
        "true",
        "null",
        "[]",
        "{}",
        "0.30000000000000004",
        "7",
    ]
    data = place.data()
    lines = [f'{{"image": "{n % 8}.png", "question": "Q{n}?", "answer": {word}}}\n' for n, word in enumerate(words)]
    (data / "data.jsonl").write_text("".join(lines))
    told, facts, left = checked(place, data)
    assert facts["samples"] + len(left) == len(words), (facts, left)
    return f"{facts['samples']} used, {len(left)} left out by name: " + ", ".join(
        sorted({item["reason"] for item in left})
    )


@situation("parquet with nulls at every level: rows, lists, structs, bytes, answers")
def nested_nulls(place: Place) -> str:
    data = place.folder / "own"
    data.mkdir()
    picture = {"bytes": png("red", (40, 40)), "path": None}
    rows = [
        {"image": picture, "question": "Q?", "answers": ["a", None]},
        {"image": picture, "question": "Q?", "answers": None},
        {"image": None, "question": "Q?", "answers": ["a"]},
        {"image": {"bytes": None, "path": None}, "question": "Q?", "answers": ["a"]},
        {"image": picture, "question": None, "answers": ["a"]},
        {"image": picture, "question": "Q?", "answers": []},
        {"image": None, "question": None, "answers": None},
        {"image": picture, "question": "R?", "answers": ["b"]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / "train.parquet")
    _, facts, left = checked(place, data)
    assert facts["samples"] + len(left) == 8 and facts["text_rows"] == 1 < facts["samples"], (facts, left)
    return f"{facts['samples']} used, one of them without an image; {len(left)} left out by name: " + ", ".join(
        sorted({item["reason"] for item in left})
    )


@situation(
    "pictures of 1 x 1, animated, CMYK, 16-bit, with a broken ICC profile, EXIF rotation, a long comment; train, report"
)
def odd_pictures(place: Place) -> str:
    data = place.data()
    frames = [Image.new("P", (40, 30), n) for n in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    red = Image.new("RGB", (60, 30), "red")
    kinds = {
        0: png("red", (1, 1)),
        1: encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        2: encoded(Image.new("CMYK", (40, 30)), "JPEG"),
        3: encoded(Image.new("I;16", (40, 30), 40_000), "PNG"),
        4: encoded(red, "PNG", icc_profile=b"\0" * 3000),
        5: encoded(red, "JPEG", exif=exif),
        6: encoded(red, "JPEG", comment=b"x" * 60_000),
    }
    for number, content in kinds.items():
        (data / f"{number}.png").write_bytes(content)
    _, facts, left = checked(place, data, "--base_model", "pocket")
    assert facts["samples"] + len(left) == 16, (facts, left)
    place.run(*place.train(data, place.folder / "run", "--eval_benchmarks", data, *FEW))
    return f"{facts['samples']} of 16 used" + "".join(f"; {item['detail'][-140:]}" for item in left[:1])


@situation("records nested 100,000 deep, a key twice, a record of 5 MiB, 10,000 keys, a lone surrogate")
def odd_records(place: Place) -> str:
    data = place.data()
    good = '{"image": "0.png", "question": "Q?", "answer": "a"'
    lines = [
        good + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        good + ', "answer": "b"}',
        good + ', "x": "' + "y" * 5_000_000 + '"}',
        good + "".join(f', "k{n}": 1' for n in range(10_000)) + "}",
        '{"image": "1.png", "question": "\\ud800?", "answer": "a"}',
        good + ', "id": "\\udfff"}',
        good + "}",
    ]
    (data / "data.jsonl").write_text("\n".join(lines) + "\n")
    told, facts, left = checked(place, data)
    assert facts["samples"] + len(left) == 7 and len(told) < 20_000, (facts, [str(item)[:200] for item in left])
    return f"{facts['samples']} used, {len(left)} left out by name: " + ", ".join(
        sorted({item["reason"] for item in left})
    )


@situation("predictions and references with huge numbers, NaN, controls and missing keys; score")
def odd_predictions(place: Place) -> str:
    path = place.folder / "predictions.jsonl"
    rows = [
        {"id": str(n), "prediction": text, "answers": [answer], "question": "Q?", "benchmark": "chartqa"}
        for n, (text, answer) in enumerate(
            [
                ("1e400", "1e400"),
                ("9" * 5000, "1"),
                ("nan", "nan"),
                ("inf", "inf"),
                ("\0", "a"),
                ("", "a"),
                ("-0", "0"),
                ("1e-400", "0"),
                ("٣", "3"),
                ("½", "0.5"),
                ("1,000%", "1000"),
            ]
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": "z"}\n')
    words = ("score", "--benchmark", "chartqa", "--predictions", path)
    ended = place.start(*words).wait(300)
    text = (place.folder / "log").read_text()
    assert ended == 2 and "Traceback" not in text, text[-1500:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended2 = place.start(*words).wait(300)
    text2 = (place.folder / "log").read_text()
    assert ended2 == 0 and "Traceback" not in text2, text2[-1500:]
    return f"{text.strip().splitlines()[0][:120]}; without that row: {text2.strip().splitlines()[-1][:100]}"

"""A thousand malformed lines in a JSONL file: each one is left out by name, none ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pictures import png
from vlm_sft.common.errors import DataError
from vlm_sft.data.sources.registry import load_split, parse_datasets

SOUND = [
    {"image": "a.png", "question": "What?", "answer": "42"},
    {"image": ["a.png", "a.png"], "question": "What?", "answer": "42", "id": "x", "split": "train"},
    {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "42"}],
        "images": ["a.png"],
    },
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "42"}]},
    {"image": {"path": "a.png"}, "prompt": "What?", "completion": "42"},
]
ODD: list[Any] = [
    None,
    True,
    -1,
    1e308,
    float("nan"),
    "",
    " ",
    "\u0000",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [{}],
    {"path": None},
    {"bytes": "!!"},
    "data:image/png;base64,AAAA",
    "data:,",
    "http://x/a.png",
    "../../x",
    "/dev/zero",
    "file://",
    ".",
    "a.png/b",
    "a\u0000.png",
    {"bytes": ""},
    [{"role": 3, "content": []}],
]


def damaged(random: np.random.Generator, number: int) -> bytes:
    """One line: a sound record with a value changed, a key lost, or its text torn."""
    record = json.loads(json.dumps(SOUND[number % len(SOUND)]))
    kind = number // len(SOUND) % 5
    key = list(record)[int(random.integers(len(record)))]
    odd = ODD[int(random.integers(len(ODD)))]
    if kind == 0:
        record[key] = odd
    elif kind == 1:
        del record[key]
    elif kind == 2:
        inner = record.get("messages") or record.get("conversations")
        if inner:
            turn = inner[int(random.integers(len(inner)))]
            turn[list(turn)[int(random.integers(len(turn)))]] = odd
        else:
            record = odd
    line = json.dumps(record).encode()
    if kind == 3:
        line = line[: int(random.integers(1, len(line)))]
    elif kind == 4:
        torn = bytearray(line)
        for place in random.integers(len(line), size=3):
            torn[place] = int(random.integers(1, 256))
        line = bytes(torn)
    return line.replace(b"\n", b" ")


def write(folder: Path, lines: list[bytes]) -> Path:
    (folder / "a.png").write_bytes(png("red"))
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_malformed_lines(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    (tmp_path / "b.png").write_bytes(png("blue"))
    sound = [json.dumps({"image": f"{name}.png", "question": "Sound?", "answer": "yes"}).encode() for name in "ab"]
    path = write(tmp_path, [*sound, *(damaged(random, number) for number in range(1000))])
    loaded = [load_split(parse_datasets(str(path))[0], split) for split in ("train", "validation", "test")]
    used = {sample.id for part in loaded for sample in part.samples}
    left = {item.id for part in loaded for item in part.left_out}
    assert len({sample.id for part in loaded for sample in part.samples if sample.question == "Sound?"}) == 2
    assert len(left) > 400 and all(item.reason and "train.jsonl" in item.detail for item in loaded[0].left_out)
    json.dumps([sorted(used), sorted(left)]).encode("utf-8")  # ids and details can be written
    assert len(used) + len(left) >= 900


def test_nothing_but_malformed_lines_is_one_message(tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    lines = [damaged(random, number) for number in range(2000)]
    lines = [line for line in lines if not line.startswith(b"{") or line[-1:] != b"}"]
    with pytest.raises(DataError, match="none of its .* samples can be used"):
        load_split(parse_datasets(str(write(tmp_path, lines)))[0], "train")


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as stream:
        stream.truncate(3 * 1024**3)  # takes no room on the disk
    lines = [json.dumps({"image": name, "question": "q", "answer": "a"}).encode() for name in ("huge.png", "a.png")]
    lines.append(json.dumps({"image": "a.png", "question": "v", "answer": "a", "split": "val"}).encode())
    loaded = load_split(parse_datasets(str(write(tmp_path, lines)))[0], "train")
    (item,) = loaded.left_out
    assert item.reason == "image cannot be read" and "3,221,225,472 bytes" in item.detail

"""Videos are refused in one sentence, wherever they come: records, files, rows in memory, questions in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

import vlm_sft
from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.common.errors import DataError
from vlm_sft.data.video import VIDEO, is_video_data, is_video_name

MP4 = b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2"
ASKED: dict[str, Any] = {"question": "q", "answer": "a"}


def talk(*parts: dict[str, Any], text: str = "q", **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]} | more


RECORDS = {
    "key": ASKED | {"image": "a.png", "video": "x.mp4"},
    "list": ASKED | {"image": "a.png", "videos": ["x.mp4"]},
    "image": ASKED | {"image": "x.MP4"},
    "address": ASKED | {"image": "https://example.org/x.webm?size=3"},
    "data": ASKED | {"image": "data:video/mp4;base64,AAAA"},
    "other key": ASKED | {"clip": "x.mov"},
    "content": ASKED | {"image": "hidden.png"},
    "mark": {"conversations": [{"from": "human", "value": "<video>\nq"}, {"from": "gpt", "value": "a"}]},
    "part": talk({"type": "video"}),
    "part with its file": talk({"type": "video", "video": "x.mp4"}),
    "url part": talk({"type": "video_url", "video_url": {"url": "https://example.org/x"}}),
    "mark in a part": talk({"type": "image"}, text="<video>q", images=["a.png"]),
    "prompt": {"prompt": talk({"type": "video"})["messages"][:1], "completion": "a"},
}


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    (tmp_path / "hidden.png").write_bytes(MP4)
    return tmp_path


def test_every_reader_says_the_same_sentence(folder: Path) -> None:
    good = [ASKED | {"image": name} for name in ("a.png", "b.png")]
    Path("set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*RECORDS.values(), *good]))
    assert main(["data", "check", "set.jsonl", "--split", "all", "--output_dir", "c", "--max_left_out", "1"]) == 0
    for layout in ("jsonl", "trl", "msswift"):
        line = ["data", "import", "set.jsonl", "--format", layout, "--output", layout, "--max_left_out", "1"]
        assert main(line) == 0
    for place in ("c", "jsonl", "trl", "msswift"):
        gone = [json.loads(line)["detail"] for line in Path(place, "left_out.jsonl").read_text().splitlines()]
        numbers = sorted(int(detail.partition(" line ")[2].partition(":")[0]) for detail in gone)
        assert numbers == list(range(1, len(RECORDS) + 1)), place
        assert all(VIDEO in detail for detail in gone), place


def test_rows_in_memory_and_questions_in_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows in ([ASKED | {"video": "x.mp4"}], [ASKED | {"image": MP4}]):
        with pytest.raises(DataError, match=VIDEO):
            vlm_sft.finetune(rows, recipe="smoketest", base_model="pocket", output_dir="run", overwrite=True)
    features = datasets.Features({"clip": datasets.Video(), **{key: datasets.Value("string") for key in ASKED}})
    clips = datasets.Dataset.from_dict({"clip": ["x.mp4"], "question": ["q"], "answer": ["a"]}, features=features)
    with pytest.raises(DataError, match=VIDEO):
        vlm_sft.finetune(clips, recipe="smoketest", base_model="pocket", output_dir="run", overwrite=True)
    for name in ("clip.mp4", "hidden.png"):
        assert main(["ask", name, "What happens?"]) == 2
        assert VIDEO in capsys.readouterr().err


def test_pictures_are_no_videos() -> None:
    for name in ("a.png", "movie.jpg", "mp4", "", None, "a.mp4.png"):
        assert not is_video_name(name)
    for kind in ("avif", "avis", "heic", "hevc", "mif1"):
        assert not is_video_data(b"\x00\x00\x00\x20ftyp" + kind.encode())
    wide = b"\x00\x00\x00\x08wide\x00\x00\x00\x00mdat"
    for head in (MP4, wide, b"\x1a\x45\xdf\xa3webm", b"RIFF\x00\x00\x00\x00AVI LIST"):
        assert is_video_data(head)
    assert not is_video_data(b"RIFF\x00\x00\x00\x00WEBPVP8 ")

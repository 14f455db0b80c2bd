"""Only raster formats of a list are opened, wherever an image comes from: nothing is handed to another program."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from tests.pictures import encoded, png
from tests.processes import Warm
from tests.report_runs import Page, make_run
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import DataError
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import FORMATS, decode_rgb
from vlm_sft.export.verify import find_questions
from vlm_sft.model.load import find_base
from vlm_sft.trackers.content import Outcome

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "vlm_sft"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Ghostscript that only leaves a mark; Pillow would start it for EPS, as it is asserted here."""
    started = tmp_path / "gs_was_started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "control.png").write_bytes(EPS)
    with pytest.raises(OSError), Image.open(tmp_path / "control.png") as picture:
        picture.load()
    assert started.exists(), "the trap does not work"
    started.unlink()
    return started


def test_there_is_one_place_that_opens_images() -> None:
    openers = {("Image", "open"), ("pyplot", "imread"), ("io", "read_image"), ("image_utils", "load_image")}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if (name, node.func.attr) in openers:
                    found.append((path.relative_to(PACKAGE).as_posix(), [word.arg for word in node.keywords]))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("PIL"):
                assert not {alias.name for alias in node.names} & {"open", "ImageFile", "EpsImagePlugin"}, path
    assert found == [("data/images.py", ["formats"])]


def test_a_report_starts_no_ghostscript(trap: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    for path in sorted((run / "evaluation" / "images").iterdir()):
        path.write_bytes(EPS)
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "but PostScript" in page.text and page.all("img") == []
    assert len(page.held["questions"]) == 40 and page.held["pictures"] == []
    assert all(one.picture is None for one in Outcome(run).shown)
    base = find_base("pocket")
    pocket = Encoder(base.processor, base.prompt)
    assert find_questions(run, 4, pocket)[1] == "generated charts"
    assert not trap.exists()


def test_ask_and_the_data_verbs_start_no_ghostscript(
    trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for colour in ("red", "green", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    (tmp_path / "trap.png").write_bytes(EPS)
    names = ("red", "trap", "green", "blue")
    rows = [{"image": f"{name}.png", "question": f"{name}?", "answer": "yes"} for name in names]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["ask", str(tmp_path / "trap.png"), "What?"]) == 2
    told = capsys.readouterr().err
    assert "trap.png: not an image in a known format" in told and "PostScript" in told and "PNG, JPEG" in told
    flags = ["--output_dir", str(tmp_path / "checked"), "--max_left_out", "0.6", "--split", "all"]
    assert main(["data", "check", str(tmp_path / "data.jsonl"), *flags]) == 0
    (gone,) = artifacts.read_jsonl(tmp_path / "checked" / artifacts.LEFT_OUT)
    assert "trap.png" in gone["detail"] and "PostScript" in gone["detail"]
    flags = ["--format", "jsonl", "--output", str(tmp_path / "imported"), "--max_left_out", "0.6"]
    assert main(["data", "import", str(tmp_path / "data.jsonl"), *flags]) == 0
    assert len(list((tmp_path / "imported" / "images").iterdir())) == 3
    assert not trap.exists()


@pytest.mark.parametrize(
    "data, name",
    [
        (EPS, "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(30), "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf  <SVG/>", "SVG"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\0\0\0\x18ftypheic\0", "HEIC"),
        *((encoded(Image.new("RGB", (9, 9)), kind), "known format") for kind in ("TGA", "ICO", "PCX")),
        (b"<" * 100_000, "known format"),
    ],
)
def test_other_formats_are_called_by_their_name(data: bytes, name: str) -> None:
    with pytest.raises(DataError, match=name) as caught:
        decode_rgb(data, "pic.png")
    assert "pic.png: not an image" in caught.value.what and ", ".join(FORMATS) in caught.value.fix


def refusal(warm: Warm, picture: Path) -> str:
    """What `vlm-sft ask` says of a picture that it has to refuse, in its own process."""
    done = warm.run("ask", picture, "What?")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_pipes_devices_and_bombs_are_refused_with_one_line(warm: Warm, tmp_path: Path) -> None:
    assert "not a regular file" in refusal(warm, Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refusal(warm, tmp_path / "pipe.png")
    with (tmp_path / "huge.png").open("wb") as stream:
        stream.truncate(2 * 1024**3)  # sparse
    assert "the limit is 1,073,741,824" in refusal(warm, tmp_path / "huge.png")
    bomb = bytearray(png(size=(8, 8)))
    bomb[16:24] = (12_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    bomb[29:33] = __import__("zlib").crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    told = refusal(warm, tmp_path / "bomb.png")
    assert told.startswith("error: ") and "too large to decode (12000 x 10000" in told and "Warning" not in told

"""`vlm-sft data import --allow_image_urls`: pictures from the web, and what a careless or hostile server sends."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.data.exchange import download, image_folder


class Web(http.server.BaseHTTPRequestHandler):
    """Serves a picture, and what a careless or hostile server would."""

    def do_GET(self) -> None:  # noqa: N802
        if self.path in ("/file", "/moved"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname" if self.path == "/file" else "/ok.png")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/gone" else 200)
        self.end_headers()
        try:
            if self.path == "/ok.png":
                self.wfile.write(png("red"))
            for _ in range(400 if self.path == "/big" else 0):
                self.wfile.write(b"x" * 100_000)
            for _ in range(40 if self.path == "/slow" else 0):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
            if self.path == "/text":
                self.wfile.write(b"<html>no picture</html>")
        except OSError:  # the reader has had enough
            pass

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture()
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_image_urls_only_when_asked(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(url: str) -> bytes:
        return download.fetch(url, seconds=0.5)

    monkeypatch.setattr(image_folder, "fetch", hurried)
    paths = ("ok.png", "moved", "gone", "big", "slow", "text", "file")
    rows = [{"id": path, "image": f"{web}/{path}", "question": "q", "answer": "a"} for path in paths]
    rows.append({"id": "ftp", "image": "ftp://127.0.0.1/a.png", "question": "q", "answer": "a"})
    source = artifacts.write_jsonl(tmp_path / "set.jsonl", rows)
    flags = ["data", "import", str(source), "--format", "jsonl", "--max_left_out", "1", "--output"]
    assert main([*flags, str(tmp_path / "no")]) == 2  # nothing can be used
    asked = tmp_path / "asked"
    assert main([*flags, str(asked), "--allow_image_urls"]) == 0
    assert [row["id"] for row in artifacts.read_jsonl(asked / "train.jsonl")] == ["ok.png", "moved"]
    assert [path.read_bytes() for path in (asked / "images").iterdir()] == [png("red")]
    gone = {row["id"]: (row["reason"], row["detail"]) for row in artifacts.read_jsonl(asked / "left_out.jsonl")}
    assert {own_id: reason for own_id, (reason, _) in gone.items()} == {
        "gone": "image URL failed",
        "big": "image URL failed",
        "slow": "image URL failed",
        "file": "image URL failed",
        "text": "image cannot be read",
        "ftp": "image missing",
    }
    assert "404" in gone["gone"][1] and "33,554,432 bytes" in gone["big"][1]
    assert "not done within 0.5 s" in gone["slow"][1] and "file:///etc/hostname' is not allowed" in gone["file"][1]

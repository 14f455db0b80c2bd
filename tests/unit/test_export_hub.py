"""`--push_to_hub` through the real client: against a local server that speaks the Hub's interface, and against none."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import save_adapter, save_base
from vlm_sft.common.errors import RunError
from vlm_sft.export.hub import push


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; it keeps what it is sent."""

    received: dict[str, Any] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.received["repo"] = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/me/charts", "id": "me/charts", "name": "me/charts"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            rows = [json.loads(line) for line in body.splitlines() if line.strip()]
            self.received["files"] = {
                row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows if row["key"] == "file"
            }
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": self.commit_url()})
        else:
            self.answer({"errors": [], "warnings": []})

    def commit_url(self) -> str:
        return f"http://{self.headers['Host']}/me/charts/commit/{'0' * 40}"

    def do_GET(self) -> None:
        self.answer({"id": "me/charts", "sha": "0" * 40, "siblings": []})

    def answer(self, value: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.received = {}
    use_endpoint(monkeypatch, server.server_port)
    yield Hub.received
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    adapter = save_adapter(save_base(place / "base"), place / "adapter")
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# charts\n")
    return adapter


def test_every_file_arrives(folder: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert push(folder, "me/charts", private=True).endswith("/me/charts")
    assert hub["repo"]["name"] == "charts" and hub["repo"]["organization"] == "me"
    assert hub["repo"].get("private") is True or hub["repo"].get("visibility") == "private"
    assert hub["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_wrong_token_is_one_message(folder: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RunError, match=r"--push_to_hub me/charts: (?s:.*)hf auth login") as caught:
        push(folder, "me/charts", private=True)
    assert "401" in str(caught.value) and "hf upload me/charts" in str(caught.value)
    assert "files" not in hub


def test_no_network_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, free.getsockname()[1])
        with pytest.raises(RunError, match=r"--push_to_hub me/charts(?s:.*) is complete"):
            push(folder, "me/charts", private=True)


def test_a_name_that_is_none(folder: Path) -> None:
    with pytest.raises(RunError, match="a b c"):
        push(folder, "a b c", private=True)

"""`vlm-sft demo`: the page through its own call, and in a real browser where there is one."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.adapters import save_adapter, save_base
from vlm_sft.cli.main import main
from vlm_sft.evaluate.demo_page import HOST, build_page, launch_arguments
from vlm_sft.evaluate.interactive import Asker, open_asker

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTIONS = ["How many bars?", "Which is red?"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Asker, Path]]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'vlm-sft[demo]'")
    folder = tmp_path_factory.mktemp("demo")
    save_adapter(save_base(folder / "base"), folder / "adapter")
    Image.effect_noise((80, 60), 90).convert("RGB").save(folder / "chart.png")
    asker = open_asker(None, folder / "adapter")
    page = build_page(asker)
    page.launch(**launch_arguments(0) | {"server_port": None})
    yield page.local_url.rstrip("/"), asker, folder / "chart.png"
    page.close()


def expected(asker: Asker, picture: Path) -> list[list[str]]:
    from vlm_sft.data.sample import ImageRef

    return [[one.question, one.base, str(one.tuned)] for one in asker.ask(ImageRef.from_path(picture), QUESTIONS)]


def test_the_call_of_the_page(served: tuple[str, Asker, Path]) -> None:
    from gradio_client import Client, handle_file

    address, asker, picture = served
    assert address.startswith(f"http://{HOST}:")
    client = Client(address, verbose=False, analytics_enabled=False)
    table = client.predict(handle_file(picture), "\n".join(QUESTIONS) + "\n\n", api_name="/ask")
    assert table["headers"] == ["question", "base", "tuned"]
    assert table["data"] == expected(asker, picture)
    with pytest.raises(Exception, match="upload an image"):
        client.predict(None, "What?", api_name="/ask")
    trap = picture.with_name("trap.png")
    trap.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(Exception, match="not an image in a known format .*PostScript"):
        client.predict(handle_file(trap), "What?", api_name="/ask")


def test_nothing_is_sent_elsewhere(served: tuple[str, Asker, Path]) -> None:
    config = json.loads(urllib.request.urlopen(f"{served[0]}/config").read())
    assert config["analytics_enabled"] is False
    assert launch_arguments(7860)["share"] is False and launch_arguments(7860)["server_name"] == "127.0.0.1"


@contextmanager
def browser(folder: Path) -> Iterator[Callable[..., Any]]:
    """A headless browser driven through its debugging pipe; yields a function that sends one command."""
    to_read, to_write = os.pipe(), os.pipe()
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder}",
        "--remote-debugging-pipe",
        "about:blank",
    ]
    shell = f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=(to_read[0], to_write[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read[0]), os.close(to_write[1])
    sender, receiver = os.fdopen(to_read[1], "wb", buffering=0), os.fdopen(to_write[0], "rb")
    state: dict[str, Any] = {"number": 0, "session": {}, "rest": b"", "urls": []}

    def send(method: str, **params: Any) -> dict[str, Any]:
        state["number"] += 1
        message = {"id": state["number"], "method": method, "params": params, **state["session"]}
        sender.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in state["rest"]:
                part = receiver.read1(1 << 16)
                assert part, "the browser has gone"
                state["rest"] += part
            line, state["rest"] = state["rest"].split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                state["urls"].append(answer["params"]["request"]["url"])
            if answer.get("id") == state["number"]:
                assert "error" not in answer, answer
                return answer["result"]

    try:
        target = send("Target.createTarget", url="about:blank")["targetId"]
        state["session"] = {"sessionId": send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        send.urls = state["urls"]  # type: ignore[attr-defined]
        yield send
    finally:
        process.kill()
        process.wait()
        sender.close(), receiver.close()


def until(send: Callable[..., Any], expression: str, seconds: float = 60.0) -> Any:
    """The value of a JavaScript expression once it is not empty."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")
        if value:
            return value
        time.sleep(0.2)
    body = send("Runtime.evaluate", expression="document.body.innerText", returnByValue=True)["result"].get("value")
    raise AssertionError(f"{expression} stayed empty; the page says: {body}")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_upload_and_ask_in_a_browser(served: tuple[str, Asker, Path], tmp_path: Path) -> None:
    address, asker, picture = served
    with browser(tmp_path / "profile") as send:
        send("Network.enable")
        send("Page.enable")
        send("DOM.enable")
        send("Page.navigate", url=address)
        until(send, "document.querySelector('#ask') && document.querySelector('input[type=file]') && 'ready'")
        root = send("DOM.getDocument")["root"]["nodeId"]
        chooser = send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        send("DOM.setFileInputFiles", nodeId=chooser, files=[str(picture)])
        until(send, "document.querySelector('img[src*=\"gradio_api/file\"]') && 'uploaded'")
        write = (
            "(() => { const box = document.querySelector('textarea'); box.value = %s; "
            "box.dispatchEvent(new Event('input', {bubbles: true})); return 'written'; })()"
        )
        until(send, write % json.dumps("\n".join(QUESTIONS)))
        time.sleep(0.5)
        send("Runtime.evaluate", expression="document.querySelector('#ask').click()")
        rows = expected(asker, picture)
        wanted = f"((t) => t.includes({json.dumps(rows[1][0])}) && t)"
        text = until(send, f"{wanted}(document.querySelector('#answers').innerText)")
        for cell in (cell for row in rows for cell in row):
            assert " ".join(cell.split()) in " ".join(text.split()), (cell, text)
        shot = base64.b64decode(send("Page.captureScreenshot")["data"])
        (tmp_path / "page.png").write_bytes(shot)
        elsewhere = [url for url in send.urls if url.startswith("http") and not url.startswith(address)]  # type: ignore[attr-defined]
        assert elsewhere == []


def test_without_gradio_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_sft.evaluate.demo_page.find_spec", lambda name: None)
    assert main(["demo", "--base_model", "pocket"]) == 2
    assert "pip install 'vlm-sft[demo]'" in capsys.readouterr().err

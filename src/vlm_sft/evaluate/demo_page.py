"""A local page to upload an image, ask, and compare base and tuned model (extra `demo`: Gradio)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vlm_sft.common.console import say
from vlm_sft.common.errors import RunError

if TYPE_CHECKING:
    from vlm_sft.evaluate.interactive import Asker

HOST = "127.0.0.1"
PORT = 7860


def require_gradio() -> None:
    """Look for what draws the page, before a model is loaded.

    Raises:
        RunError: it is not installed.
    """
    if find_spec("gradio") is None:
        raise RunError("the demo page needs the package gradio", "pip install 'vlm-sft[demo]'")


def open_page(asker: Asker, port: int = PORT) -> Any:
    """Serve the page to this machine, and say where; the call returns at once.

    Args:
        asker: what answers.
        port: of the page.

    Returns:
        The gradio.Blocks; `close()` ends it, `block_thread()` waits for Ctrl+C.

    Raises:
        RunError: the port cannot be used.
    """
    page = build_page(asker)
    try:
        page.launch(**launch_arguments(port))
    except OSError as error:
        raise RunError(f"--port {port} cannot be used: {error}", "pass another --port") from error
    say(f"{asker.title}: open http://{HOST}:{port} in a browser of this machine; Ctrl+C ends it")
    return page


def launch_arguments(port: int) -> dict[str, Any]:
    """How the page is served: to this machine only, with no tunnel, and nothing sent elsewhere."""
    return {
        "server_name": HOST,
        "server_port": port,
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "inbrowser": False,
    }


def build_page(asker: Asker) -> Any:
    """Make the page.

    Args:
        asker: what answers.

    Returns:
        A gradio.Blocks with one call, "/ask": (image file, questions by line) to rows of question and answers.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    header = ["question", "base", "tuned"] if asker.tuned else ["question", "answer"]

    def answer(picture: str | None, text: str) -> list[list[str]]:
        return _rows(asker, picture, text)

    with gradio.Blocks(title="vlm-sft demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {asker.title}\nUpload an image and ask: one question a line.")
        with gradio.Row():
            # Without a mode Gradio leaves the file as it is: only our own reader, with its list of formats, decodes it.
            picture = gradio.Image(type="filepath", image_mode=None, label="image", sources=["upload"], height=360)
            with gradio.Column():
                text = gradio.Textbox(label="questions", lines=3, placeholder="What is the highest value?")
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
        table = gradio.Dataframe(headers=header, label="answers", interactive=False, wrap=True, elem_id="answers")
        button.click(answer, [picture, text], table, api_name="ask")
    return page


def _rows(asker: Asker, picture: str | None, text: str) -> list[list[str]]:
    """The table of the page; mistakes of the user are told in it."""
    import gradio

    from vlm_sft.common.errors import VlmSftError
    from vlm_sft.data.images import check_image
    from vlm_sft.data.sample import ImageRef

    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not picture or not questions:
        raise gradio.Error("upload an image and write a question", print_exception=False)
    try:
        answers = asker.ask(check_image(ImageRef.from_path(picture)), questions)
    except VlmSftError as error:
        raise gradio.Error(str(error), print_exception=False) from error
    return [[one.question, one.base, *([] if one.tuned is None else [one.tuned])] for one in answers]

"""`vlm-sft demo`: a local page to upload an image, ask, and compare a base with its adapter (Gradio, optional)."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vlm_sft.cli.ask import add_model_arguments

if TYPE_CHECKING:
    from vlm_sft.evaluate.interactive import Asker

HELP = "open a local page to upload an image, ask, and compare base and tuned"
HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (default: %(default)s)")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    from vlm_sft.common.console import say
    from vlm_sft.common.errors import RunError
    from vlm_sft.evaluate.interactive import open_asker

    if find_spec("gradio") is None:
        raise RunError("vlm-sft demo: the package gradio is not installed", "pip install 'vlm-sft[demo]'")
    asker = open_asker(args.base_model, args.adapter, args.flash_attn, args.max_new_tokens, args.allow_other_base)
    page = build_page(asker)
    try:
        page.launch(**launch_arguments(args.port))
    except OSError as error:
        raise RunError(f"--port {args.port} cannot be used: {error}", "pass another --port") from error
    say(f"{asker.title}: open http://{HOST}:{args.port} in a browser on this machine; Ctrl+C stops it")
    page.block_thread()
    return 0


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

"""`vlm-sft ask`: base and tuned side by side, several questions behind one image, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.adapters import PROMPT, save_adapter, save_base
from vlm_sft.cli.main import main
from vlm_sft.common.errors import plain
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.images import check_image
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.records import questions_of
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.evaluate.interactive import open_asker
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.load import find_base, load_model
from vlm_sft.model.vision_features import TowerCounter

QUESTIONS = ["How many bars are there?", "Which one is red?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ask")
    save_adapter(save_base(folder / "base"), folder / "adapter")
    Image.effect_noise((80, 60), 90).convert("RGB").save(folder / "chart.png")
    return folder


def alone(place: Path, question: str, tuned: bool) -> str:
    """The answer of one model to one question, loaded for it alone."""
    base = find_base(str(place / "base"), prompt=PROMPT)
    model = load_model(base)
    model = load_adapter(model, place / "adapter") if tuned else model
    sample = Sample("0", "ask", "", (ImageRef.from_path(place / "chart.png"),), question, "", ())
    ((reply,),) = SharedPrefixBackend(base, model).answers([[[sample]]], PROMPT.max_new_tokens)
    assert reply.cut, "a model of random weights ends no answer by itself"
    return f"{reply.text} … [cut at the limit of {PROMPT.max_new_tokens} tokens; --max_new_tokens raises it]"


def test_base_and_tuned_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(place / "chart.png"), *QUESTIONS, "--adapter", str(place / "adapter")]) == 0
    told = capsys.readouterr().out
    expected = [(alone(place, text, False), alone(place, text, True)) for text in QUESTIONS]
    assert all(base != tuned for base, tuned in expected)
    assert "80 x 60 pixels" in told
    for text, (base, tuned) in zip(QUESTIONS, expected, strict=True):
        assert plain(f"{text}\n  base:  {base}\n  tuned: {tuned}\n") in told


def test_the_image_is_computed_once_a_side(place: Path) -> None:
    asker = open_asker(None, place / "adapter")
    use = TowerCounter(asker.backend.model)
    answers = asker.ask(ImageRef.from_path(place / "chart.png"), QUESTIONS * 3)
    assert len(answers) == 6 and answers[:2] == answers[2:4]
    # A near tie between two words is decided alone, so there may be more; one an answer would be 12.
    assert use.images <= 4


def test_images_stand_where_a_question_has_them(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is that of a record with the same words, and the answers are those of each question alone."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(place / "other.png")
    images = [check_image(ImageRef.from_path(place / name)) for name in ("chart.png", "other.png")]
    questions = ["Is <image> like <image>?", "Which?", "What is this?\n<image>", "Is <image> like <image>, too?"]
    asker = open_asker(None, place / "adapter")
    given: list[EncodedGroup] = []
    encode = asker.backend.encoder.encode
    monkeypatch.setattr(
        asker.backend.encoder, "encode", lambda *args, **how: given.append(encode(*args, **how)) or given[-1]
    )
    answers = asker.ask(images, questions)
    monkeypatch.undo()
    for question, answer in zip(questions, answers, strict=True):
        assert asker.ask(images, [question]) == [answer]
        record = {"images": ["a", "b"], "question": question, "answer": "x"}
        (read,) = questions_of(record)
        sample = Sample("0", "ask", "", tuple(images), read.question, "", (), places=read.places)
        trained = asker.backend.encoder.encode([sample], with_answers=False)
        whole = [*trained.prefix_ids, *trained.questions[0].prompt_ids]
        prompts = [[*group.prefix_ids, *one.prompt_ids] for group in given for one in group.questions]
        assert whole in prompts
    shown = [str(place / "chart.png"), questions[0], "--image", str(place / "other.png")]
    assert main(["ask", *shown, "--adapter", str(place / "adapter")]) == 0
    assert plain(f"tuned: {answers[0].tuned}") in capsys.readouterr().out
    assert main(["ask", *shown[:2], "--adapter", str(place / "adapter")]) == 2
    assert "<image> 2 times, 1 images" in capsys.readouterr().err


def test_pocket_answers_without_an_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(place / "chart.png"), "What is it?"]) == 0
    told = capsys.readouterr().out
    assert "asked of pocket" in told and "tuned:" not in told


def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["nowhere.png", "What?"], "nowhere.png"),
        ([str(place / "base" / "config.json"), "What?"], "not an image"),
        ([str(place / "chart.png"), "What?", "--adapter", str(place / "base")], "it holds a whole model"),
        ([str(place / "chart.png"), "What?", "--max_new_tokens", "0"], "--max_new_tokens 0"),
    ):
        assert main(["ask", *words]) == 2
        message = capsys.readouterr().err
        assert expected in message and message.count("error: ") == 1, message

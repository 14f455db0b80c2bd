import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.data.sources.records import questions_of
from vlm_sft.data.sources.rows import RowProblem, clean_text, most_common

WORDS = st.sampled_from(["user", "gpt", "system", "assistant", "image", "text", "image_url", "<image>", "", "q", "a"])
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "image",
        "images",
        "question",
        "answer",
        "answers",
        "role",
        "content",
        "from",
        "value",
        "type",
        "text",
        "url",
        "bytes",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(record=JSON)
def test_any_json_is_questions_or_one_named_problem(record):
    try:
        questions = questions_of(record)
    except RowProblem as problem:
        assert problem.reason and problem.detail
        return
    assert questions
    for question in questions:
        assert question.problem or (question.question and question.target and question.answers)


@pytest.mark.parametrize(
    "text, clean, at",
    [
        ("<image>\nWhat?", "What?", 0),
        ("What?\n<image>\n", "What?\n", 6),
        ("a<image>b", "ab", 1),
        (" See <image> now", "See  now", 4),
        ("One.\n<image>\nTwo.", "One.\n\nTwo.", 5),
    ],
)
def test_marks_of_a_conversation_place_their_images(text, clean, at):
    for record in (
        {"prompt": text, "completion": "a"},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]},
    ):
        (question,) = questions_of(record | {"image": "x.png"})
        assert (question.question, question.places) == (clean, ((0, at),) if at else ())
        (both,) = questions_of(record | {"images": ["x.png", "y.png"]})  # one that no mark places comes first
        assert (both.question, both.places) == (clean, ((0, 0), (0, at)) if at else ())


@pytest.mark.parametrize(
    "text, clean, at",
    [
        ("<image>\nWhat?", "What?", 0),
        ("<image> What?", "What?", 0),
        ("What?\n<image>", "What?\n", 6),
        ("The <image> tag.", "The <image> tag.", 0),
        ("What is <image>", "What is <image>", 0),
        ("a<image>b", "a<image>b", 0),
        ("One.\n<image>\nTwo.", "One.\n\nTwo.", 5),
    ],
)
def test_beside_one_image_a_plain_question_keeps_the_mark_as_a_word(text, clean, at):
    (question,) = questions_of({"image": "x.png", "question": text, "answer": "The <image> tag."})
    assert (question.question, question.target) == (clean, "The <image> tag.")
    assert question.places == (((0, at),) if at else ())


def test_beside_several_images_every_mark_of_a_plain_question_is_one():
    record = {"images": ["x.png", "y.png"], "answer": "a", "question": "Compare <image> with <image>."}
    (question,) = questions_of(record)
    assert (question.question, question.places) == ("Compare  with .", ((0, 8), (0, 14)))
    turns = [{"role": "user", "content": "Now?"}, {"role": "assistant", "content": "yes"}]
    (question,) = questions_of(record | {"history": turns, "question": "<image>Then?"})
    assert question.places == ((0, 0), (2, 0))


def test_images_stand_in_the_turn_that_shows_them():
    def image(name: str) -> dict[str, str]:
        return {"type": "image", "image": name}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    turns = [
        ("user", [image("a"), text("Look "), image("b"), text(" here.")]),
        ("user", [text("What?"), text(" Why? "), image("c")]),
        ("assistant", "1"),
        ("user", [image("d"), text("And "), image("e")]),
        ("assistant", [text("Like "), image("f")]),
        ("user", "So?"),
        ("assistant", "2"),
    ]
    first, second, third = questions_of({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert (first.question, "".join(first.images)) == ("Look  here.\nWhat?\nWhy? ", "abc")
    assert first.places == ((0, 0), (0, 5), (0, 23))
    assert second.problem and second.problem.reason == "image in an answer" and "".join(second.images) == "abcde"
    assert "".join(third.images) == "abcdef" and third.places == (*first.places, (2, 0), (2, 4), (3, 5))
    assert (third.history[2].text, third.history[3].text) == ("And ", "Like ")
    last = [{"role": role, "content": content} for role, content in turns[5:]]
    with pytest.raises(RowProblem, match="image in a system text"):
        questions_of({"messages": [{"role": "system", "content": [image("a")]}, *last]})


def test_what_a_user_does_not_say_is_never_a_mark():
    turns = [
        ("system", "Use <image>."),
        ("user", "<image>What?"),
        ("assistant", "An <image> tag"),
        ("user", "Sure?"),
        ("assistant", "<image>"),
    ]
    record = {"images": ["x.png"], "messages": [{"role": role, "content": text} for role, text in turns]}
    first, second = questions_of(record)
    assert (first.system, first.question, first.target) == ("Use <image>.", "What?", "An <image> tag")
    assert (second.history[1].text, second.target, second.places) == ("An <image> tag", "<image>", ())
    assert (
        questions_of({"image": "x.png", "prompt": "Q", "completion": "<image> x <image>"})[0].target
        == "<image> x <image>"
    )


def test_parts_place_images_and_texts_beside_them_are_text():
    parts = [{"type": "image"}, {"type": "text", "text": "What is <image> and <image>?"}]
    record = {
        "images": ["x.png"],
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}],
    }
    assert questions_of(record)[0].question == "What is <image> and <image>?"


@pytest.mark.parametrize(
    "record",
    [
        {"image": "x.png", "question": "<image><image>What?", "answer": "a"},
        {"image": "x.png", "question": "Compare <image> with <image>.", "answer": "a"},
        {"question": "<image>What?", "answer": "a"},
        {"image": "x.png", "prompt": "<image> or <image>?", "completion": "a"},
        {
            "images": ["x.png"],
            "messages": [
                {"role": "user", "content": "<image>"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "<image>?"},
                {"role": "assistant", "content": "b"},
            ],
        },
    ],
)
def test_more_marks_than_images_are_refused_in_every_format(record):
    with pytest.raises(RowProblem, match="more placeholders than images"):
        questions_of(record)


def test_a_turn_without_an_answer_leaves_its_neighbours():
    turns = [
        {"from": "human", "value": "1?"},
        {"from": "gpt", "value": " "},
        {"from": "human", "value": "2?"},
        {"from": "human", "value": "really?"},
        {"from": "gpt", "value": "two"},
        {"from": "gpt", "value": "again"},
    ]
    first, second, third = questions_of({"image": "x.png", "conversations": turns})
    assert first.problem is not None and first.problem.reason == "empty answer"
    assert (second.question, second.target, second.turn) == ("2?\nreally?", "two", 2)
    assert third.problem is not None and third.problem.reason == "empty question"


def test_most_common_and_clean_text():
    assert most_common(["b", "a", "a", "b"]) == "b"
    assert clean_text(3.5, "answer") == "3.5"
    with pytest.raises(RowProblem, match="answer is not text"):
        clean_text(float("inf"), "answer")

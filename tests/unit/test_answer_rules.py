"""Rules of further benchmarks on cases worked out by hand, and through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.cli.main import main
from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.answer_rules import (
    chartqapro,
    choice_or_word,
    multiple_choice,
    ocrbench,
    squad_exact,
    squad_f1,
    squad_normalize,
)
from vlm_sft.evaluate.mmmu_rule import mmmu, named_option


@pytest.mark.parametrize(
    "prediction, gold, year, score",
    [
        ("0.96", "1", ["NO"], 1.0),
        ("0.95", "1", ["NO"], 0.0),  # 0.05000000000000004 in float64
        ("0.94", "1", ["NO"], 0.0),
        ("62", "62%", ["NO"], 1.0),  # unlike in ChartQA, the sign does not count
        ("0", "0.0", ["NO"], 1.0),
        ("0.001", "0", ["NO"], 0.0),
        ("1995", "1994", ["NO"], 1.0),
        ("1995", "1994", ["YES"], 0.0),
        ("1994.", "1994", ["yes"], 1.0),
        ("Blu", "blue", ["NO"], 0.75),
        ("bl", "blue", ["NO"], 0.0),  # a similarity of one half is not enough here
        ("[Germany, 12]", "[Germany, 12]", ["NO"], 7 / 13 / 2),  # bare words make no list of a prediction
        ("['Germany', '12']", "[Germany, 12]", ["NO"], 1.0),
        ("['Germany', 12.3]", "['Germany', 12]", ["NO"], 1.0),
        ("['Germany', '12', 'x']", "[Germany, 12]", ["NO"], 2 / 3),
        ("Germany", "[Germany, 12]", ["NO"], 0.5),
        ("[2013, 2015]", "[2013, 2014]", ["YES"], 0.5),  # one flag holds for all parts
        ("[2013, 2015]", "[2013, 2014]", ["YES", "NO"], 1.0),
        ("anything", "[New York]", [], 0.0),
        ("straxe", "straße", ["NO"], 1 - 1 / 7),  # the length is that of the text in upper case
        ("a  B ", "A b", ["NO"], 1.0),
        ("12 %", "12", ["NO"], 1.0),
        ("1,000", "1000", ["NO"], 1 - 1 / 5),  # a comma makes a text of a number
        ("$5", "5", ["NO"], 0.0),
        ("nan", "5", ["NO"], 0.0),
        ("5\n.", "5", ["NO"], 1.0),  # full stops go first, then line ends
        ("5.\n", "5", ["NO"], 1.0),  # a number, line end and all
        ("ab.\n", "ab", ["NO"], 1 - 1 / 3),  # the full stop before the line end stays
        (" ['a', 'b'] ", "[a, b]", ["NO"], 1.0),
        ("['a', 'b',]", "['a', 'b']", ["NO"], 1.0),
        ("('a', 'b')", "['a', 'b']", ["NO"], 0.0),  # a tuple is no list
        ("[]", "[]", ["NO"], 1.0),  # nor is nothing: two texts
        ("[2013]", "2013", ["NO"], 1.0),
        ("2014", "2013", ["NO", "YES"], 1.0),  # the flag of another part
        ("2013.0", "2013", ["YES"], 0.0),
        ("[0x" + "f" * 5000 + "]", "1", ["NO"], 0.0),  # no text of Python's can hold that number
        ("1", "[{[1]: 2}]", ["NO"], 0.0),
        ("[" * 9000, "1", ["NO"], 0.0),
        (r"['\d']", r"['\d']", ["NO"], 1.0),
    ],
)
def test_chartqapro(prediction: str, gold: str, year: list[str], score: float) -> None:
    assert chartqapro(prediction, [gold], year) == pytest.approx(score)


def test_of_a_conversation_the_last_answer_and_flag_count() -> None:
    answers, flags = ["7", "1994"], ["NO", "YES"]
    assert chartqapro("1995", answers, flags, "Conversational") == 0.0
    assert chartqapro("1995", answers, flags, "Factoid") == 1.0  # the first flag is that of the first part
    assert chartqapro("7", answers) == 0.0


@pytest.mark.parametrize(
    "prediction, score",
    [
        ("B", 1.0),
        ("(B)", 1.0),
        ("B. a blue car", 1.0),
        ("The answer is B.", 1.0),
        ("A", 0.0),
        ("A or B", 0.0),
        ("b", 0.0),  # a letter is a capital, as in the reference
        ("It is a blue car.", 1.0),
        ("It is a red car, not a blue car.", 0.0),
        ("B is what I would say here about it", 0.0),  # the letter is too far from the end
        ("a blue car " * 9, 0.0),  # twice as long as all options together
        ("", 0.0),
        ("The correct answer is **B**. Here is why: it has the colour of the sky.", 1.0),
        ("The answer is bright", 1.0),  # the reference reads a letter there, whatever word it begins
        ("The answer is a blue car", 0.0),
        ("Cannot determine the answer: B", 0.0),
        ("Z a blue car", 0.0),
        ("**B**", 1.0),
        ("{B}!", 1.0),
        ("[B], of course", 1.0),
        ("B/", 0.0),  # a stroke is no mark that goes
        ("B-", 0.0),
        ("Answer:B", 1.0),
        ("B B B", 1.0),  # one option, however often it is named
        ("B one two three", 1.0),
        ("B one two three four", 0.0),  # three words may follow
        ("B one two three four five", 0.0),
        ("B one two three four five B", 0.0),  # the first place counts
        ("A blue car", 0.0),  # A is a letter
        ("a BLUE car", 1.0),
        ("Option B, not A", 0.0),
        ("answer is A or B", 0.0),  # both are words; then the first that is stated
        ("answer is b or A", 0.0),  # b is no word of its own, so A is the only letter
        ("answer is b or something", 1.0),
        ("The answer is\n\n**b**", 1.0),
        ("answer is: B and not A", 0.0),  # a colon is no space
        ("The answer is D. So B it is, or A", 0.0),  # D is no option here
        ("Sorry, I can't help with images of people yet. B", 0.0),
        ("sorry, I can't help with images of people yet. B", 1.0),
        ("a blue car and a bus", 0.0),
        ("a busy blue car", 0.0),  # the text is looked for within words
        ("Ｂ", 0.0),
        ("\u0392", 0.0),
        ("B\u00a0a blue car", 1.0),
    ],
)
def test_multiple_choice_by_letter_or_text(prediction: str, score: float) -> None:
    assert multiple_choice(prediction, ["B"], ["a red car", "a blue car", "a bus"]) == score


def test_the_right_option_by_its_text() -> None:
    options = ["A red car", "C", "a bus", "twice", "Twice"]
    assert [multiple_choice(text, [" A BUS "], options) for text in ("C", "A")] == [1.0, 0.0]
    assert multiple_choice("C", ["c"], options) == 1.0  # a letter before a text
    assert multiple_choice("Z.", ["Z"], ["x"] * 30) == 1.0  # no letter is left for more
    for answer in ("G", "twice", "", "2", "a b"):
        with pytest.raises(EvaluationError, match="which is none"):
            multiple_choice("A", [answer], options)


def test_letters_without_options() -> None:
    assert multiple_choice("F", ["F"]) == 1.0 and multiple_choice("G", ["F"]) == 0.0
    assert choice_or_word("B)", ["B"]) == 1.0
    assert choice_or_word("Yes.", ["yes"]) == 1.0 and choice_or_word("Yes, it is", ["Yes"]) == 0.0


@pytest.mark.parametrize(
    "prediction, answers, dataset, score",
    [
        ("The sign says CENTRE street", ["centre"], "SVT", 1.0),
        ("two\nlines", ["Two lines"], "", 1.0),
        ("centr", ["centre"], "", 0.0),
        ("x ^ { 2 } + Y", ["x^{2}+Y"], "HME100k", 1.0),
        ("x^{2}+y", ["x^{2}+Y"], "HME100k", 0.0),
        ("x^{2}+y", ["x^{2}+Y"], "other", 1.0),
        ("b", ["a", "b"], "", 1.0),
        ("two  words", ["two words"], "", 0.0),  # spaces within a text count
        ("a\r\nb", ["a b"], "", 0.0),
        ("a\tb", ["a b"], "", 0.0),
        ("the STRASSE", ["straße"], "", 0.0),
        ("1,000", ["1000"], "", 0.0),
        ("x12y", ["12"], "", 1.0),  # within a word or number, too
        ("x", [""], "", 1.0),
        ("x", ["  \n "], "", 1.0),
        ("", ["x"], "", 0.0),
        ("word", ["word."], "", 0.0),
        ("x\n^\t2", ["x^2"], "HME100k", 0.0),  # a tab is no space
        ("x\n^ 2", ["x ^\n2"], "HME100k", 1.0),
        (r"\frac { 1 } { 2 } = 0.5", [r"\frac{1}{2}"], "HME100k", 1.0),
        ("Ａ１", ["a1"], "", 0.0),  # wide letters are others, unlike in lmms-eval
    ],
)
def test_ocrbench_contains(prediction: str, answers: list[str], dataset: str, score: float) -> None:
    assert ocrbench(prediction, answers, dataset) == score


def test_squad() -> None:
    assert squad_normalize(" The  U.S., an ally ") == "us ally"
    assert squad_exact("the cat", ["Cat!"]) == 1.0 and squad_exact("cats", ["cat"]) == 0.0
    assert squad_f1("a black cat", ["the cat", "dog"]) == pytest.approx(2 / 3)
    assert squad_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)  # a word counts as often as both have it
    assert squad_f1("the", [""]) == 1.0 and squad_f1("cat", ["the"]) == 0.0 and squad_f1("dog", ["cat"]) == 0.0
    assert squad_normalize("A-B an_d The\tthe\u00a0x") == "ab and x" and squad_normalize("theatre a.") == "theatre"
    assert squad_normalize("“it’s” ½ 1,000.50 $5") == "“it’s” ½ 100050 5"  # only marks of ASCII go
    assert squad_f1("in 1998 and 1999", ["1998, 1999", "x"]) == pytest.approx(2 / 3)
    assert squad_f1("", ["cat"]) == 0.0 and squad_f1("", ["", "cat"]) == 0.0 and squad_f1("", ["!", "the"]) == 1.0
    assert squad_exact("?!", ["."]) == 1.0 and squad_exact("a the", ["x"]) == 0.0
    assert squad_f1("the", ["cat", "a"]) == squad_exact("the", ["cat", "a"]) == 0.0  # an answer without words is none


def scored(tmp_path: Path, benchmark: str, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> Any:
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"id": number, **row}) + "\n" for number, row in enumerate(rows)))
    code = main(["score", "--benchmark", benchmark, "--predictions", str(path), "--json"])
    told = capsys.readouterr()
    return json.loads(told.out) if code == 0 else told.err


def test_what_a_rule_needs_stands_in_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prediction": "1995", "answers": ["1994"]}
    result = scored(tmp_path, "chartqapro", [row, row | {"year": ["YES"]}], capsys)
    assert result["accuracy"] == 0.5 and result["metric"] == "chartqapro_relaxed_accuracy"
    row = {"prediction": "a bus", "answers": ["B"], "options": ["a car", "a bus"]}
    assert scored(tmp_path, "multiple_choice", [row], capsys)["accuracy"] == 1.0
    result = scored(tmp_path, "squad", [{"prediction": "black cat", "answers": ["cat"]}], capsys)
    assert result["accuracy"] == pytest.approx(2 / 3) and result["secondary"] == {"squad_exact": 0.0}
    told = scored(tmp_path, "ai2d", [row | {"options": "a car"}], capsys)
    assert "'options' is text, not a list of texts" in told
    told = scored(tmp_path, "ai2d", [row | {"answers": ["a tram"]}], capsys)
    assert "line 1: the right answer is 'a tram': no letter of an option, and no option's text" in told
    told = scored(tmp_path, "ocrbench", [row | {"dataset": 3}], capsys)
    assert "'dataset' is a number, not text" in told


MMMU_OPTIONS = ["a red ball", "the blue box", "green"]


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", "B"),
        (" b", None),
        ("(A) or rather (B)", "B"),
        ("(A), B", "A"),  # brackets go before spaces
        ("A B A", "A"),
        ("C.", "C"),
        ("C'!", "C"),
        ("C!'", None),  # the marks go one kind after the other: ' goes last, and ! is left
        ("B: the blue box", None),
        ("What we see here is surely green, not a red ball", "A"),
        ("it is green", None),  # a text counts from six words on
        ("  C  ", "C"),
        ("(C", None),
        ("A B", "B"),
        ("(B) is wrong, (A) right, (B) no", "B"),  # the last place of each
        ("Option: C. because", None),
        ("\nC\n", None),  # only spaces set a letter apart
        ("'C'", "C"),
        ("Answer is\tC", None),
        ("D", None),  # there is no such option
        ("we see the BLUE BOX there or so", "B"),
        ("we see BLUE BOXES there or so", None),
        ("green and once more green and The Blue box", "B"),
        ("", None),
    ],
)
def test_mmmu_reads_the_option_as_its_reference(prediction: str, chosen: str | None) -> None:
    assert named_option(prediction, dict(zip("ABC", MMMU_OPTIONS, strict=True))) == chosen
    assert mmmu(prediction, ["B"], MMMU_OPTIONS) == float(chosen == "B")


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The result is 1,250.004 kg", ["1250"], 1.0),
        ("1.25e3", ["1250"], 1.0),
        ("12.97 V. So we take 13", ["12.97"], 0.0),  # sentences end at lines only, as the text is in lower case by then
        ("We found 5.\nTherefore the answer is 6", ["5"], 0.0),
        ("x = 5", ["5"], 1.0),
        ("it could be Tampa", ["Miami", "tampa"], 1.0),
        ("carbon", ["C"], 0.0),  # one letter counts only beside a space
        ("vitamin c deficiency", ["C"], 1.0),
        ("", ["7"], 0.0),
        ("-3", ["3"], 0.0),
        ("about 3.14159", ["3.14"], 1.0),
        ("3.146", ["3.14"], 0.0),
        ("5%", ["5"], 1.0),
        ("$1,234.50", ["1234.5"], 0.0),  # the reference reads 1,234 and 50
        ("1e-3", ["0"], 1.0),  # rounded to two decimals
        ("the answer is so 7 is", ["7"], 1.0),
        ("it is 5 kg", ["5 kg"], 1.0),
        ("yes it is", ["yes"], 1.0),  # no text follows the key word, so all of it counts
        ("it is no, so yes", ["no"], 0.0),  # the shortest end of a line
        ("Final answer : .", ["final"], 1.0),  # a mark alone is no answer, so all of it counts
        ("x = 3 = 4", ["4"], 1.0),
        ("x = 4\ny", ["4"], 1.0),
        ("THE RESULT IS PARIS.", ["paris"], 1.0),
        ("parisian", ["Paris"], 1.0),
        ("12", ["1", "2"], 0.0),
        ("answer: b", ["B"], 1.0),
        ("b", ["B"], 1.0),
        ("ab", ["B"], 0.0),
        ("nan", ["5"], 0.0),
        ("infinity", ["inf"], 1.0),
    ],
)
def test_mmmu_reads_open_answers_as_its_reference(prediction: str, answers: list[str], score: float) -> None:
    assert mmmu(prediction, answers) == score

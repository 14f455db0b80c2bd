"""Captions: CIDEr, BLEU-4 and ROUGE-L by hand, against the library's corpus scores, end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pictures import COLOURS, png
from vlm_sft.cli.main import main
from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.caption_words import words
from vlm_sft.evaluate.captions import caption_scores, corpus_bleu
from vlm_sft.evaluate.own_metrics import rule_of
from vlm_sft.evaluate.statistics import bootstrap, mean_interval

ROWS: list[dict[str, Any]] = [
    {"id": 1, "prediction": "A man rides a brown horse.", "answers": ["a man rides a brown horse", "man on a horse"]},
    {"id": 2, "prediction": "a cat", "answers": ["two dogs run in the park", "dogs are running"]},
    {"id": 3, "prediction": "the bus is red and parked here", "answers": ["The bus is red.", "a red bus is parked"]},
    {"id": 4, "prediction": "", "answers": ["a plate of food"]},
]


# What PTBTokenizer 3.4.1 gives, called as the COCO evaluation calls it.
PTB = r"""
A man's T-shirt, isn't it? | a man 's t-shirt is n't it
Costs $3.50 (or 1,200)! | costs $ 3.50 -lrb- or 1,200 -rrb-
They’re “fine” — café | they 're fine café
a so-called "man" (the one) & [x] {y} | a so-called man -lrb- the one -rrb- & -lsb- x -rsb- -lcb- y -rcb-
10% off! only $9.99!! | 10 % off only $ 9.99 !!
room #5, route #66 #fun @home | room # 5 route # 66 #fun @home
what? what?? what?! no way!? ... .. | what what ?? what ?! no way !?
at 5:00 a.m. in L.A., 3:45pm 10am 16:9 | at 5:00 a.m. in l.a. 3:45 pm 10am 16:9
St. Louis vs. Mr. Smith Jr. on James Street. | st. louis vs. mr. smith jr. on james street
no. 5 and No.7 and no 5 and no. | no. 5 and no. 7 and no 5 and no
the man is ill. time to wash. a mass. Ill. Mass. | the man is ill time to wash a mass ill. mass.
plan B. is good. in 1990. it | plan b. is good in 1990 it
cannot can't cant gonna gimme 'tis | can not ca n't cant gon na gim me 't is
o'clock o'neill ma'am y'all rock'n'roll rock 'n' roll | o'clock o'neill ma'am y' all rock 'n' roll rock 'n' roll
it's its' dogs' dog's '90s 90's in '85 model '7 | it 's its dogs dog 's '90s 90 's in '85 model 7
5'10" 6' 10" 6ft 8 1/2 x 11 | 5 10 6 10 6ft 8 1/2 x 11
½ cup £5 €5 5¢ 98.6° | 1/2 cup # 5 $ 5 5 cents 98.6 °
a,b c , d 1,000 3,5 w/ a/b 24/7 / | a b c d 1,000 3,5 w / a/b 24/7 /
x-ray - a -- b 3-year-old 7-up 12-25-10 -5 +5 .5 | x-ray a b 3-year-old 7-up 12-25-10 -5 +5 .5
AT&T at&t a&b A&W | at&t at & t a & b a&w
word;word word:word word.word www.site.com, | word word word word word.word www.site.com
me@site.com <br> *x* ** ~ ^ + = < c++ c# | me@site.com <br> * x * ** ~ ^ + = < c++ c#
"""


@pytest.mark.parametrize(("text", "expected"), [line.split(" | ") for line in PTB.strip().splitlines()])
def test_words_of_a_caption(text: str, expected: str) -> None:
    assert words(text) == expected


def test_a_caption_without_words() -> None:
    assert words("") == words(" . , “” - ") == ""


def test_scores_of_each_caption() -> None:
    rouge = caption_scores("rouge_l", ROWS)
    assert rouge[0] == 1.0 and rouge[1] == rouge[3] == 0.0
    precision, recall, beta = 4 / 7, 4 / 4, 1.2
    assert rouge[2] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    bleu = caption_scores("bleu4", ROWS)
    assert bleu[0] == pytest.approx(1.0) and bleu[1] < 1e-3 and bleu[3] < 1e-3
    assert bleu[2] == pytest.approx((5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    cider = caption_scores("cider", ROWS)
    assert cider[0] > 4 and cider[1] == cider[3] == 0.0 and 0 < cider[2] < cider[0]
    # An identical caption of two n-grams that no other image has: the similarity is 1 for both lengths of n-gram.
    pair = [{"prediction": "red bus", "answers": ["red bus"]}, {"prediction": "x", "answers": ["a green tree"]}]
    assert caption_scores("cider", pair)[0] == pytest.approx(10 * (1 + 1) / 4)


def test_bleu_of_the_corpus_is_the_librarys_and_has_a_bootstrap_interval() -> None:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for row in ROWS:
        scorer += (words(row["prediction"]), [words(answer) for answer in row["answers"]])
    found = corpus_bleu(ROWS)
    assert found["accuracy"] == pytest.approx(scorer.compute_score(option="closest")[0][3])
    assert found["n"] == 4 and found["interval"][0] <= found["accuracy"] <= found["interval"][1]


def test_the_bootstrap_covers_and_follows_clusters() -> None:
    values = np.random.default_rng(1).normal(2.0, 0.5, 400)
    mean, (low, high) = bootstrap(np.stack([values, np.ones(400)], axis=1), None, lambda sums: sums[:, 0] / sums[:, 1])
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(400), rel=0.15)
    together = mean_interval(np.repeat(values[:20], 20), np.repeat(np.arange(20), 20).tolist())
    assert together[1] - together[0] > 2 * (high - low)


def test_captions_are_scored_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_SFT_CACHE", str(tmp_path / "cache"))
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for rule in ("cider", "bleu4", "rouge_l"):
        assert main(["score", "--metric", rule, "--predictions", "p.jsonl", "--json", "--per_item", "items.jsonl"]) == 0
        result = json.loads(capsys.readouterr().out)
        scores = [json.loads(line)["score"] for line in Path("items.jsonl").read_text().splitlines()]
        assert scores == caption_scores(rule, ROWS) and result["accuracy"] == pytest.approx(sum(scores) / 4)
        assert result["interval"][0] <= result["accuracy"] <= result["interval"][1]
        assert ("corpus" in result) == (rule == "bleu4")
    rows = [
        {
            "image": f"{index}.png",
            "question": "Describe it.",
            "answers": [f"a {colour} square", colour],
            "split": "test",
        }
        for index, colour in enumerate(COLOURS[:4])
    ]
    for index, colour in enumerate(COLOURS[:4]):
        Path(f"{index}.png").write_bytes(png(colour, (56, 56)))
    Path("seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base_model", "pocket", "--benchmark", "seen.jsonl", "--metric", "cider", "--max_new_tokens", "4"]
    assert main(["eval", *flags, "--output_dir", "one"]) == 0
    said = [json.loads(line) for line in Path("one/seen/predictions.jsonl").read_text().splitlines()]
    assert [row["score"] for row in said] == caption_scores("cider", said)
    assert json.loads(Path("one/seen/results.json").read_text())["metric"] == "cider"
    for row in said:
        row["prediction"] = row["answers"][0]
    Path("two/seen").mkdir(parents=True)
    Path("two/seen/predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    assert main(["compare", "one", "two", "--metric", "cider", "--output_dir", "both"]) == 0
    (row,) = json.loads(Path("both/compare.json").read_text())["comparisons"]
    assert (
        row["metric"] == "cider"
        and row["accuracy"] > 1
        and row["accuracy"] == pytest.approx(sum(caption_scores("cider", said)) / 4)
    )


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(EvaluationError, match=r"vlm-sft\[captions\]"):
        rule_of("cider")

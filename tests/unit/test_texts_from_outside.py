"""Rules for texts from outside: what is left out of messages, and how files take names, questions and answers."""

from __future__ import annotations

import json

import pytest

from vlm_sft.common.artifacts import in_markdown, is_formula
from vlm_sft.common.errors import RunError, plain, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://anna:pa@ss@host/x@y.png", "https://…@host/x@y.png"),
        ("https:/anna:pass@host/x", "https:/…@host/x"),  # what Path makes of it
        ("see http://t0k3n@host:80", "see http://…@host:80"),
        ("s3://b/k?X-Amz-Signature=ab%2F&Expires=9&api_key=zz", "s3://b/k?X-Amz-Signature=…&Expires=9&api_key=…"),
        ("login hf_abcdefghijklmnopqrst failed", "login … failed"),
        ("/data/a@b/c@d.png and C:/a@b", "/data/a@b/c@d.png and C:/a@b"),
        ("file:///home/a@b/x.png git@github.com:a/b", "file:///home/a@b/x.png git@github.com:a/b"),
        ("a token=7 or key=8 of a question", "a token=7 or key=8 of a question"),
    ],
)
def test_secrets_of_addresses_are_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert shown in str(RunError(text, "mend it"))


def test_controls_are_shown_as_json_reads_them_back() -> None:
    text = "a\x1b[31m\x9b\x7f\u202e\r\n\tß象🦉 שלום"
    assert plain(text) == "a\\u001b[31m\\u009b\\u007f\\u202e\\u000d\n\tß象🦉 שלום"
    assert json.loads(plain(json.dumps({"q": text}, ensure_ascii=False))) == {"q": text}


@pytest.mark.parametrize("cell", ["=1+1", "+1 a", "-x", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_formula_is_known(cell: str) -> None:
    assert is_formula(cell)


@pytest.mark.parametrize("cell", ["", "-1", "+2.5", "-1e9", "a=1", " ", "−1"])
def test_a_number_is_no_formula(cell: str) -> None:
    assert not is_formula(cell)


def test_a_text_stays_text_in_markdown() -> None:
    assert in_markdown("a|b\n# c <script> `d` [e](f) 1 < 2") == "a\\|b # c \\<script> \\`d\\` [e]\\(f) 1 < 2"

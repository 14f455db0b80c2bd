"""Every type of image-text-to-text models ends well or in one line: some odd ones, and the table of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import all_types as bench
from common import with_block
from tests import tiny_models
from vlm_sft.common import artifacts


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blip", "are not supported"),  # no language model beside its tower
        ("dots3_note", "weights are missing"),  # its default configuration builds no model
        ("fuyu", "does not have a chat template"),
        ("mllama", "cross-attention"),
        ("shieldgemma2", "are not in its weights"),
    ],
)
def test_an_odd_type_ends_in_one_line(tmp_path: Path, name: str, words: str) -> None:
    found = bench.examine(name, tmp_path)
    for part in (found["bare"], found["train"]):
        assert (part["exit_code"], part["errors"]) == (2, 1), part
    assert words in bench.outcome(found)[1]
    assert "image processor is missing" in found["bare"]["message"] or found["layout"]


def test_a_crash_is_a_result(tmp_path: Path) -> None:
    def crash() -> dict[str, object]:
        raise SystemError("odd")

    found = bench.alone(crash, tmp_path / "found.json")
    assert found["crash"] == "SystemError: odd" and "raise SystemError" in found[bench.TRACEBACK]
    assert bench.outcome(found) == ("crash", "SystemError: odd")


def test_the_page_is_made_from_the_artifact_and_holds_no_crash() -> None:
    result = artifacts.read_json(bench.RESULT)
    page = bench.PAGE.read_text(encoding="utf-8")
    assert with_block(page, "all_types", bench.table(result)) == page
    known = {kind.model_type for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    found = {entry["type"] for entry in result["types"]}
    assert known - found <= tiny_models.FAMILIES.keys() and found <= known
    assert {bench.outcome(entry)[0] for entry in result["types"]} <= {"trains", "stops", "refused"}

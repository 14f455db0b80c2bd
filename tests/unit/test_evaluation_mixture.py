"""The evaluation loss of several data sets: in the proportions of the training, and never mixed with older values."""

from __future__ import annotations

import pytest

from vlm_sft.planning.fingerprint import MIXED_LOSS, differences
from vlm_sft.train.evaluation_loss import mixed_loss


@pytest.mark.parametrize(
    "means, shares, expected",
    [
        ({"a": 1.0, "b": 3.0}, {"a": 0.75, "b": 0.25}, 1.5),
        ({"a": 1.0, "b": 3.0}, {"a": 0.75, "b": 0.15, "c": 0.1}, 1.0 * 0.75 / 0.9 + 3.0 * 0.15 / 0.9),
        ({"a": 1.0, "b": 3.0}, {"a": 1.0}, 1.0),  # nothing of b is trained
        ({"a": 1.0, "b": 3.0}, {"c": 1.0}, 2.0),
    ],
)
def test_sets_count_by_their_share_of_the_training(
    means: dict[str, float], shares: dict[str, float], expected: float
) -> None:
    assert mixed_loss(means, shares) == pytest.approx(expected)


def test_a_checkpoint_of_the_older_definition_is_another_training() -> None:
    assert not differences({}, {MIXED_LOSS: False})
    assert not differences({MIXED_LOSS: True}, {MIXED_LOSS: True})
    (found,) = differences({"data_sha256": "x"}, {MIXED_LOSS: True, "data_sha256": "x"})
    assert found.startswith("eval_loss: ") and "cannot be compared" in found

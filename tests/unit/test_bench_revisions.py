"""The benchmark of revisions: its ratios, its jobs for older workers, its checkouts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import revisions
from common import ROOT


def test_ratios_are_paired_and_geometric() -> None:
    found = revisions.ratio([10.0, 20.0, 40.0], [20.0, 10.0, 40.0])  # 1/2, 2, 1
    assert found["ratio"] == pytest.approx(1.0)
    reach = 4.302653 * 0.693147 / 3**0.5  # t(0.975, 2) and the deviation of -ln 2, ln 2, 0
    assert found["low"] == pytest.approx(2.718282**-reach, rel=1e-4)
    assert found["high"] == pytest.approx(2.718282**reach, rel=1e-4)


def test_the_table_holds_this_checkout_against_each_earlier_one() -> None:
    speeds = {
        "HEAD": {"cold": [44.0, 44.0], "warm": [90.0, 91.0]},
        "abc1234": {"cold": [40.0, 40.0], "warm": [90.0, 91.0]},
    }
    origin = {"case": "easy_vqa", "shape": "small", "device": "CPU", "git": {"hash": "f" * 40, "dirty": False}}
    row = revisions.table([origin | {"questions_per_second": speeds}]).splitlines()[-1]
    assert row.split(" | ")[2:6] == ["abc1234", "2", "40.00, 44.00", "1.100 [1.100, 1.100]"]
    assert "1.000 [1.000, 1.000]" in row and "fffffff" in row


def test_an_older_worker_gets_the_keys_it_knows(tmp_path: Path) -> None:
    worker = tmp_path / "bench" / "peers" / "worker.py"
    worker.parent.mkdir(parents=True)
    worker.write_text("class Job:\n    model: str\n    epochs: int = 1\n")
    assert revisions.known_to(tmp_path, {"model": "m", "epochs": 2, "cpu_format": "float32"}) == {
        "model": "m",
        "epochs": 2,
    }
    job = {"model": "m", "cpu_format": "float32"}
    assert revisions.known_to(ROOT, job) == job


def test_a_checkout_is_that_of_its_commit_and_goes_away() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with revisions.checkouts(["HEAD"]) as trees:
        (short, folder), head = list(trees.items())[1], trees["HEAD"]
        assert head == ROOT and (folder / "bench" / "peers" / "worker.py").is_file()
        shown = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], text=True, capture_output=True, check=True)
        assert shown.stdout.startswith(short)
    assert not folder.exists()


@pytest.mark.parametrize(("words", "message"), [([], "name a revision"), (["HEAD", "--rounds", "1"], "two rounds")])
def test_a_comparison_without_a_base_or_an_interval_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        revisions.parse(words)
    assert message in capsys.readouterr().err


def test_an_unknown_revision_is_refused() -> None:
    with pytest.raises(SystemExit, match="not a commit"), revisions.checkouts(["no-such-revision"]):
        pass

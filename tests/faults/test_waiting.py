"""Ranks that prepare data together: one may take long, one may fail, and their disks may not be shared."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.faults.harness import arguments
from tests.faults.injection import Fault, Injected
from tests.pictures import COLOURS
from tests.processes import Started, Warm, free_port
from tests.wording import line_with
from vlm_sft.data.cache.team import Team
from vlm_sft.data.sample import ImageRef

AWAY = 14.0  # seconds that a rank stands still
LIMITS = {"vlm_sft.distributed.launch:STEP_SECONDS": 10.0, "vlm_sft.distributed.collectives:WAITING_LINE_SECONDS": 1.0}
STEPS = 2


def flags(place: Path, output: Path, cache: Path, *more: str) -> list[str]:
    found = arguments(
        place,
        output,
        "--cache_dir",
        str(cache),
        "--max_steps",
        str(STEPS),
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--ignore_forecast",
        *more,
    )
    at = found.index("--eval_samples")
    return found[:at] + found[at + 2 :]


def finished(ranks: list[Started], log: Path, output: Path) -> dict[str, Any]:
    """What run.json says about a run whose ranks all ended well."""
    codes = [rank.wait(120) for rank in ranks]
    for rank, code in zip(ranks, codes, strict=True):
        if code is None:
            rank.kill()
    assert codes == [0, 0], log.read_text()[-3000:]
    facts = json.loads((output / "run.json").read_text())
    assert (facts["status"], facts["steps"]) == ("finished", STEPS)
    return facts


def kept(cache: Path, kind: str) -> list[set[str]]:
    """The keys of each shard."""
    indexes = (path for path in cache.glob(f"{kind}/*/*.json") if path.name != "entry.json")
    return [set(json.loads(index.read_text())["records"]) for index in indexes]


def test_a_rank_may_prepare_for_longer_than_a_step_may_take(
    injected_warm: Warm, injected_place: Path, tmp_path: Path
) -> None:
    """It stands still in the middle of its share; the other one waits, says so, and both go on."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    faults = Injected(tmp_path / "faults", Fault("write", f"{cache}/tokens/*.safetensors*", "pause", count=1, rank="1"))
    line = flags(injected_place, tmp_path / "run", cache)
    ranks = injected_warm.start_ranks(line, log, faults.variables, LIMITS)
    while not faults.met[0] and ranks[1].wait(0.02) is None:
        pass
    time.sleep(AWAY)
    os.kill(ranks[1].pid, signal.SIGCONT)
    facts = finished(ranks, log, tmp_path / "run")
    told = log.read_text()
    assert "s for rank 1 on " in told and f"to prepare {len(COLOURS)} images, 1/2 on each rank" in told, told[-2000:]
    assert facts["engine"]["processed_images"] == facts["engine"]["tokenised_images"] == len(COLOURS)
    for kind in ("images", "tokens"):
        parts = kept(cache, kind)
        assert len(parts) == 2 and all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == len(COLOURS)


def test_what_one_rank_cannot_write_the_others_make_themselves(
    injected_warm: Warm, injected_place: Path, tmp_path: Path
) -> None:
    cache, log, output = tmp_path / "cache", tmp_path / "log", tmp_path / "run"
    faults = Injected(tmp_path / "faults", Fault("write", f"{cache}/tokens/*.safetensors*", rank="1"))
    line = flags(injected_place, output, cache)
    facts = finished(injected_warm.start_ranks(line, log, faults.variables), log, output)
    assert line_with(log.read_text(), "warning (rank 1): ", "cannot be stored", cache)
    assert facts["engine"]["processed_images"] == len(COLOURS)
    assert facts["engine"]["tokenised_images"] > len(COLOURS)


def test_an_image_that_one_rank_cannot_read_is_left_out_on_both(
    injected_warm: Warm, injected_place: Path, tmp_path: Path
) -> None:
    paths = [injected_place / f"{number}.png" for number in range(len(COLOURS))]
    path = next(path for path in paths if Team(1, 2).owns(ImageRef.from_path(path).key))
    # Four reads are for its checksum and its size, each as far as its end; the fifth one is to prepare it.
    faults = Injected(tmp_path / "faults", Fault("read", f"*/{path.name}", first=5, rank="1"))
    log, output = tmp_path / "log", tmp_path / "run"
    line = flags(injected_place, output, tmp_path / "cache", "--max_left_out", "0.5")
    finished(injected_warm.start_ranks(line, log, faults.variables), log, output)
    rows = [json.loads(row) for row in (output / "left_out.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rows} == {"image cannot be read"} and len(rows) == 3, log.read_text()[-2000:]
    assert json.loads((output / "data.json").read_text())["train"]["images"] == len(COLOURS) - 1


def test_ranks_with_different_data_end_at_once(injected_warm: Warm, injected_place: Path, tmp_path: Path) -> None:
    faults = Injected(tmp_path / "faults", Fault("read", "*/5.png", rank="1"))
    log = tmp_path / "log"
    line = flags(injected_place, tmp_path / "run", tmp_path / "cache", "--max_left_out", "0.5")
    ranks = injected_warm.start_ranks(line, log, faults.variables)
    assert [rank.wait(60) for rank in ranks] == [2, 2], log.read_text()[-2000:]
    told = log.read_text()
    assert line_with(told, "error: ", "rank 1 ") and told.count("error: the ranks") == 2
    assert "5.png" in told and "Traceback" not in told


def test_machines_without_a_shared_disk_have_all_features_each(
    injected_warm: Warm, injected_place: Path, tmp_path: Path
) -> None:
    """Two ranks with a cache folder each, as the deepspeed launcher starts them on two machines."""
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
    caches, log, output = [tmp_path / "first", tmp_path / "second"], tmp_path / "log", tmp_path / "run"
    ranks = [
        injected_warm.start(
            flags(injected_place, output, cache, "--feature_cache", "1GB"),
            log,
            {**both, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, cache in enumerate(caches)
    ]
    facts = finished(ranks, log, output)
    decision = facts["engine"]["feature_cache"]["training"]
    assert decision["used"] and decision["images"] == len(COLOURS), decision
    assert facts["engine"]["processed_images"] == 2 * len(COLOURS)
    for cache in caches:
        for kind in ("images", "tokens", "features"):
            assert len(set.union(*kept(cache, kind))) == len(COLOURS), (cache, kind)
    assert not any(path.name.startswith(".probe") for cache in caches for path in cache.iterdir())
    # The adapter is that of two ranks with one folder.
    shared = tmp_path / "shared"
    line = flags(injected_place, shared, tmp_path / "cache", "--feature_cache", "1GB")
    facts = finished(injected_warm.start_ranks(line, log), log, shared)
    assert facts["engine"]["processed_images"] == len(COLOURS)
    assert len(kept(tmp_path / "cache", "features")) == 2
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (output, shared))
    assert max(float((one[name] - tensor).abs().max()) for name, tensor in other.items()) < 1e-5

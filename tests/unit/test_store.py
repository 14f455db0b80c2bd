"""The store of tensors, the coding of pixels, and the folder of the cache."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_sft.common.errors import RunError
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.data.cache import store as store_module
from vlm_sft.data.cache.directory import ENTRY, clear_entries, entry_weights, list_entries, open_entry, settings_key
from vlm_sft.data.cache.image_tensors import CODES, PixelFormat, compress, restore
from vlm_sft.data.cache.store import CacheFullError, Record, Store
from vlm_sft.data.engine_options import parse_feature_cache

RECORDS: dict[str, Record] = {
    "a": {"x": torch.arange(6, dtype=torch.int32).view(2, 3), "y": torch.randn(4).to(torch.bfloat16)},
    "b": {"x": torch.zeros(0, dtype=torch.int64), "y.z": torch.tensor([1.5])},
    "c": {"x": torch.randn(3, 5)},
}


def filled(folder: Path, records: dict[str, Record] = RECORDS) -> Path:
    store = Store(open_entry(folder, "images", {"seed": 1}, "test"))
    writer = store.writer()
    for key, record in records.items():
        writer.add(key, record)
    writer.close()
    return store.folder


def same(left: Record, right: Record) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def reopened(folder: Path) -> Store:
    store = Store(folder)
    store.open(RECORDS)
    return store


def read(store: Store, key: str) -> Record:
    record = store.get(key)
    assert record is not None
    return record


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    store = reopened(filled(tmp_path))
    assert all(same(read(store, key), record) for key, record in RECORDS.items())
    assert "d" not in store and store.get("d") is None
    copied = pickle.loads(pickle.dumps(store))  # as a loader process that is spawned gets it
    assert same(read(copied, "c"), RECORDS["c"])


def test_numbered_tensors_come_back_in_their_order(tmp_path: Path) -> None:
    record = {f"features.pooled.{number}": torch.tensor([number]) for number in range(12)}
    filled(tmp_path, {"a": record})
    (folder,) = (tmp_path / "images").iterdir()
    assert list(read(reopened(folder), "a")) == list(record)


def test_shards_are_cut_and_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_RECORDS", 2)
    folder = filled(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) == 2
    other = Store(folder)
    other.publish({"d": {"x": torch.ones(1)}})
    store = Store(folder)
    store.open(["a", "d"])
    assert "a" in store and "d" in store and "c" not in store  # the shard of c alone is not opened


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        ("safetensors", truncate, "bytes instead of"),
        ("safetensors", flip_a_byte, "checksum"),
        ("safetensors", Path.unlink, "only its index"),
        ("json", truncate, "damaged"),
        ("json", lambda path: path.write_text('{"records": 3}'), "damaged"),
    ],
)
def test_damage_is_told_in_one_line_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, damage: Any, reason: str
) -> None:
    folder = filled(tmp_path)
    damage(next(path for path in folder.glob(f"*.{suffix}") if path.name != ENTRY))
    store = reopened(folder)
    assert [key for key in RECORDS if store.get(key) is None]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and reason in told and str(folder) in told
    assert [path.name for path in folder.iterdir()] == [ENTRY]
    filled(tmp_path)
    assert same(read(reopened(folder), "a"), RECORDS["a"])


def test_a_shard_that_is_cut_or_cleared_while_it_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = filled(tmp_path)
    first, second = reopened(folder), reopened(folder)
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-3])  # in place: what is mapped is cut off, too
    (lost,) = [key for key in RECORDS if first.get(key) is None]
    assert "it is cut off" in capsys.readouterr().err and not path.exists()
    assert [key for key in RECORDS if second.get(key) is None] == [lost]
    assert same(read(second, "c" if lost != "c" else "a"), RECORDS["c" if lost != "c" else "a"])


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom vlm_sft.data.cache import store\n"
        "store.write_json = lambda *_: os._exit(9)\n"
        "store.Store(Path(sys.argv[1])).publish({'a': {'x': torch.ones(3)}})"
    )
    folder = open_entry(tmp_path, "images", {}, "test")
    assert subprocess.run([sys.executable, "-c", code, str(folder)], timeout=120).returncode == 9
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert "a" not in reopened(folder)


def test_budget_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(open_entry(tmp_path, "features", {}, "test"))
    writer = store.writer(budget_bytes=100)
    with pytest.raises(CacheFullError, match="budget"):
        writer.add("a", {"x": torch.zeros(26)})
    assert not writer.usable
    monkeypatch.setattr(store_module, "SPARE_BYTES", 10**18)
    with pytest.raises(CacheFullError, match="free on the disk"):
        store.publish(RECORDS)
    assert [path.name for path in store.folder.iterdir()] == [ENTRY]


@pytest.mark.parametrize("shape", [(16, 3 * 2 * 14 * 14), (1, 5, 3, 28, 28), (2, 3, 8, 8)])
def test_pixels_are_coded_without_loss(shape: tuple[int, ...]) -> None:
    layout = PixelFormat((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1 / 255, 2)
    colours = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).float()
    colours.view(-1)[8] = colours.view(-1)[7]  # so that one table entry cannot hold both values below
    by_channel = (16, 3, 2, 196) if len(shape) == 2 else (-1, 3, 1, shape[-1] * shape[-2])
    if len(shape) == 2:
        colours.view(by_channel)[:, :, 1] = colours.view(by_channel)[:, :, 0]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (layout.mean, layout.std))
    values = ((colours.view(by_channel) / 255 - mean) / std).view(shape)
    record = compress(values, layout)
    assert record is not None and record[CODES].dtype == torch.uint8
    assert record[CODES].numel() * (2 if len(shape) == 2 else 1) == values.numel()
    assert torch.equal(restore(record).view(torch.int32), values.view(torch.int32))
    off = values.clone()
    off.view(-1)[7] += 1e-3
    assert compress(off, layout) is None


def test_entries_are_listed_and_cleared(tmp_path: Path) -> None:
    old, new = filled(tmp_path), open_entry(tmp_path, "tokens", {"seed": 2}, "other")
    os.utime(old / ENTRY, (0, time.time() - 10 * 86_400))
    (tmp_path / "images" / "mine").mkdir()
    (tmp_path / "images" / "mine" / "notes.txt").write_text("not the cache's")
    assert [(entry.kind, entry.what) for entry in list_entries(tmp_path)] == [("tokens", "other"), ("images", "test")]
    opened = reopened(old)
    count, size = clear_entries(tmp_path, older_than_days=5)
    assert count == 1 and size > 100 and not old.exists() and new.exists()
    assert same(opened.get("c"), RECORDS["c"])  # a run that has it mapped goes on
    assert clear_entries(tmp_path, None)[0] == 1
    assert (tmp_path / "images" / "mine" / "notes.txt").is_file()


def test_the_command_lists_and_clears(tmp_path: Path) -> None:
    filled(tmp_path)

    def cache(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vlm_sft", "data", "cache", *words, "--cache_dir", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert "images" in cache("list").stdout
    refused = cache("clear")
    assert refused.returncode == 2 and "--older_than DAYS or --all" in refused.stderr
    assert "removed 1 entries" in cache("clear", "--all").stdout
    assert "0 entries" in cache("list").stdout


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, vlm_sft.data.cache.directory, vlm_sft.cli.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_keys_follow_every_setting() -> None:
    assert settings_key({"a": 1, "b": [2]}) == settings_key({"b": [2], "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})


def test_an_entry_says_what_it_is_made_from(tmp_path: Path) -> None:
    value = json.loads((open_entry(tmp_path, "tokens", {"seed": 3}, "pocket") / ENTRY).read_text())
    assert (value["kind"], value["what"], value["settings"]) == ("tokens", "pocket", {"seed": 3})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match="cannot"):
        open_entry(blocked, "tokens", {}, "pocket")


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("off", "off"), ("20GB", 20 * 10**9), ("1.5 mb", 1_500_000)]
)
def test_feature_cache_sizes(text: str, value: int | str) -> None:
    assert parse_feature_cache(text) == value


@pytest.mark.parametrize("text", ["", "0", "-3GB", "many", "20GiB", "GB"])
def test_feature_cache_refuses(text: str) -> None:
    with pytest.raises(RunError, match="--feature_cache"):
        parse_feature_cache(text)


def test_the_mark_of_weights_is_that_of_their_bytes(tmp_path: Path) -> None:
    one, other, trained = (tmp_path / name for name in ("one", "other", "trained"))
    for folder, value in ((one, 0.5), (other, 0.5), (trained, 0.25)):
        folder.mkdir()
        save_file({"weight": torch.full((1000,), value)}, folder / "model.safetensors")
    assert weights_fingerprint(str(one)) == weights_fingerprint(str(other)) != weights_fingerprint(str(trained))
    assert (
        weights_fingerprint(str(tmp_path))
        == weights_fingerprint("nobody/such-a-model")
        == weights_fingerprint("no id!/at/all")
        == ""
    )
    marks = [weights_fingerprint(str(one)), weights_fingerprint(str(trained))]
    for mark in (*marks, marks[0], ""):
        folder = open_entry(tmp_path, "features", {"seed": 4}, "pocket", mark)
    assert entry_weights(json.loads((folder / ENTRY).read_text())) == marks
    (folder / ENTRY).write_bytes(b"{damaged")
    assert open_entry(tmp_path, "features", {"seed": 4}, "pocket", marks[0]) == folder
    assert entry_weights(json.loads((folder / ENTRY).read_text())) == marks[:1]

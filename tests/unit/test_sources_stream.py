"""`chartqa@stream`: a bounded number of rows, without the rest of the set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import png
from vlm_sft.common.errors import DataError
from vlm_sft.data.sources import chartqa, registry
from vlm_sft.data.sources.hub import load_table
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets
from vlm_sft.evaluate.tasks import dataset_text

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SHARDS, ROWS = 6, 10


@pytest.fixture()
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub repository on disk: shards with an image a row."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        rows = range(shard * ROWS, (shard + 1) * ROWS)
        pq.write_table(
            pa.table(
                {
                    "image": pa.array([{"bytes": png((row, 0, 0)), "path": None} for row in rows], IMAGE),
                    "query": [f"{row}?" for row in rows],
                    "label": [[str(row)] for row in rows],
                    "human_or_machine": [0] * ROWS,
                }
            ),
            folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet",
        )
    return folder.parent


def test_only_the_rows_that_are_needed_are_fetched(repository: Path) -> None:
    source = dataclasses.replace(
        chartqa.SOURCE, hub_ids=(str(repository),), official={"train": "train", "validation": "val"}
    )

    def stream(rows: int) -> list[int]:
        return [int(s.target) for s in load_table(source, DatasetSpec("chartqa", stream=rows), "train").samples]

    first = stream(8)
    assert len(first) == 8 and len({row // ROWS for row in first}) <= 2
    far = next(shard for shard in range(1, SHARDS) if shard not in {row // ROWS for row in first + stream(18)})
    broken = repository / "data" / f"train-{far:05d}-of-{SHARDS:05d}.parquet"
    broken.write_bytes(b"PAR1 cut off")
    assert len(stream(9)) == 9  # another number of rows, so not from the cache: the broken shard was not opened
    with pytest.raises(DataError):
        load_table(source, DatasetSpec("chartqa"), "train")


def test_a_hold_out_does_not_depend_on_how_much_was_fetched(repository: Path) -> None:
    source = dataclasses.replace(
        chartqa.SOURCE, hub_ids=(str(repository),), official={"train": "train"}, hold_out_fraction=0.3
    )
    few, many = (
        {s.target for s in load_table(source, DatasetSpec("chartqa", stream=rows), split).samples}
        for rows, split in ((30, "validation"), (60, "train"))
    )
    assert few and not few & many


def test_the_grammar_and_its_limits() -> None:
    specs = parse_datasets("chartqa@stream:2,textvqa@stream")
    assert specs == [DatasetSpec("chartqa", None, 2.0, 0), DatasetSpec("textvqa", None, None, 0)]
    assert dataset_text(specs) == "chartqa@stream,textvqa@stream"
    with pytest.raises(DataError, match="demo is not on the Hub"):
        parse_datasets("demo@stream")
    with pytest.raises(DataError, match="pass --max_train and --max_eval"):
        registry.load_split(specs[0], "train")

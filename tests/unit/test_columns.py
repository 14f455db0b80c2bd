"""`--columns` and `hub:ORG/NAME`: any table as data, and what is said where a column is missing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vlm_sft
from tests.pictures import png
from tests.processes import Warm
from tests.shards import shard
from vlm_sft.cli.main import main
from vlm_sft.common.errors import DataError
from vlm_sft.data.sources import hub_sets, jsonl
from vlm_sft.data.sources.columns import flag_for, renamed
from vlm_sft.data.sources.registry import SPLITS, load_split
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.evaluate.tasks import dataset_text

Captured = pytest.CaptureFixture[str]
COLUMNS = "image=img,question=query,answer=label"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def frame(first: int, count: int) -> pa.Table:
    """Rows whose pictures, questions and answers are all different."""
    numbers = range(first, first + count)
    images = pa.array([{"bytes": png((number, 0, 0)), "path": None} for number in numbers], IMAGE)
    rows = {"img": images, "query": [f"{n}?" for n in numbers], "label": [str(n) for n in numbers]}
    return pa.table(rows | {"note": ["x"] * count})


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the Hub in its parquet layout, under its id in the working folder; the Hub is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for made in (hub_sets._whole, hub_sets._split_names, hub_sets._first):
        made.cache_clear()
    data = tmp_path / "some" / "pictures" / "data"
    data.mkdir(parents=True)
    pq.write_table(frame(0, 20), data / "train-00000-of-00002.parquet", row_group_size=8)
    pq.write_table(frame(20, 20), data / "train-00001-of-00002.parquet")
    pq.write_table(frame(40, 5), data / "validation-00000-of-00001.parquet")
    pq.write_table(frame(50, 5), data / "testmini-00000-of-00001.parquet")
    parts = [("train", "train-*"), ("validation", "validation-*"), ("testmini", "testmini-*")]
    files = "".join(f"  - split: {split}\n    path: data/{name}\n" for split, name in parts)
    (data.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    return tmp_path


def test_a_set_of_the_hub_is_own_data(folder: Path, capsys: Captured) -> None:
    (spec,) = parse_datasets("hub:some/pictures:2", COLUMNS)
    assert (spec.name, spec.hub, spec.weight, spec.own) == ("pictures", "some/pictures", 2.0, True)
    assert dataset_text([spec]) == "hub:some/pictures"
    for split, numbers in (("train", range(40)), ("validation", range(40, 45))):
        loaded = load_split(spec, split)
        assert [sample.target for sample in loaded.samples] == [str(number) for number in numbers]
        assert [sample.question for sample in loaded.samples] == [f"{number}?" for number in numbers]
        assert all(s.images[0].load() == png((n, 0, 0)) for s, n in zip(loaded.samples, numbers, strict=True))
        assert f"from hub:some/pictures: {len(numbers)} questions" in loaded.description
    assert capsys.readouterr().err.count("hub:some/pictures: splits that are not used: testmini") == 1
    assert load_split(spec, "train").samples[3].metadata["where"].startswith("hub:some/pictures ")
    line = ["data", "export", "hub:some/pictures", "--columns", COLUMNS, "--format", "jsonl", "--output", "out"]
    assert main(line) == 0
    assert len(Path("out/train.jsonl").read_text().splitlines()) == 40


def test_a_set_of_the_hub_that_names_files_of_this_machine_is_told(folder: Path, capsys: Captured) -> None:
    Path("here").mkdir()
    Path("other/paths").mkdir(parents=True)
    Path("other/paths/inside.png").write_bytes(png("blue"))
    Path("here/secret.png").write_bytes(png("red"))
    names = [str(folder / "here/secret.png"), str(folder / "other/paths/inside.png")]
    images = pa.array([{"bytes": None, "path": name} for name in names], IMAGE)
    pq.write_table(
        pa.table({"image": images, "question": ["a", "b"], "answer": ["c", "d"]}), "other/paths/train.parquet"
    )
    assert main(["data", "check", "hub:other/paths", "--split", "all", "--output_dir", "c"]) == 0
    assert "outside of the data's folder, by their path or a link: 1; the first:" in capsys.readouterr().err


def test_a_set_of_the_hub_is_streamed(folder: Path) -> None:
    (spec,) = parse_datasets("hub:some/pictures@stream", COLUMNS)
    with pytest.raises(DataError, match="pass --max_train"):
        load_split(spec, "train")
    first = load_split(spec, "train", 8)
    assert len(first.samples) == 8 and "streamed: its first rows, 8 at most" in first.description
    assert all(sample.images[0].load() == png((int(sample.target), 0, 0)) for sample in first.samples)
    assert len({int(sample.target) // 20 for sample in first.samples}) == 1  # of one of the two shards
    assert load_split(spec, "train", 8).samples == first.samples
    assert [sample.target for sample in load_split(spec, "validation", 3).samples] != []
    assert jsonl.LOOKED_AT >= 1000 and dataset_text([spec]) == "hub:some/pictures@stream"


def test_the_hub_out_of_reach_a_name_that_is_none_and_its_grammar(folder: Path, capsys: Captured) -> None:
    assert main(["data", "check", "hub:nobody/nothing", "--columns", COLUMNS, "--output_dir", "c"]) == 2
    told = capsys.readouterr().err
    assert "hub:nobody/nothing is on the Hugging Face Hub, which cannot be reached" in told and "HF_HOME" in told
    assert main(["data", "check", "hub:some/pictures:other", "--columns", COLUMNS, "--output_dir", "c"]) == 2
    assert "hub:some/pictures:other cannot be loaded" in capsys.readouterr().err
    for entry, place, weight in (
        ("hub:a/b:en", "a/b:en", None),
        ("hub:a/b:2:1", "a/b:2", 1),
        ("hub:b:v1.0:0.5", "b:v1.0", 0.5),
        ("hub:a/b:en@stream:3", "a/b:en", 3),
    ):
        (spec,) = parse_datasets(entry)
        assert (spec.hub, spec.weight, spec.stream) == (place, weight, 0 if "@stream" in entry else None), entry
    for wrong in ("hub:", "hub:a/b/c", "hub:a b", "hub:../../etc", "hub:a/b:en:de", "hub:a/b:0"):
        with pytest.raises(DataError):
            parse_datasets(wrong)


def test_a_missing_column_names_those_there_and_the_flag(folder: Path, capsys: Captured) -> None:
    pq.write_table(frame(0, 4), "set.parquet")
    for place in ("set.parquet", "hub:some/pictures"):
        assert main(["data", "check", place, "--output_dir", "c"]) == 2
        told = capsys.readouterr().err
        assert f"{place} has no columns for question and answer (it has: img, query, label, note)" in told
        flag = told[told.index("--columns") :].split(";")[0].strip()
        assert main(["data", "check", place, *shlex.split(flag), "--split", "all", "--output_dir", "c"]) == 0
        capsys.readouterr()
        wrong = COLUMNS.replace("query", "qeury")
        assert main(["data", "check", place, "--columns", wrong, "--output_dir", "c"]) == 2
        told = capsys.readouterr().err
        assert "no column 'qeury'; did you mean query?" in told and f"--columns {COLUMNS}" in told
    rows = [{"bild": "a.png", "frage": "?", "answer": "a"}]
    Path("set.jsonl").write_text(json.dumps(rows[0]))
    assert main(["data", "check", "set.jsonl", "--columns", "question=farge", "--output_dir", "c"]) == 2
    assert "bild, frage" in capsys.readouterr().err
    assert main(["data", "check", "demo_charts", "--columns", COLUMNS, "--output_dir", "c"]) == 2
    assert "names no data of your own" in capsys.readouterr().err
    assert flag_for(["question", "answer"], ["Question_EN", "gold_answer"]) == (
        "--columns question=Question_EN,answer=gold_answer"
    )


def test_conversations_however_a_set_stores_them(folder: Path, capsys: Captured) -> None:
    """Pairs of user and assistant, as the_cauldron and FineVision have them, and a mapping of lists."""
    pairs = [{"user": "First?", "assistant": "1", "source": "s"}, {"user": "Second?", "assistant": "2", "source": "s"}]
    talk = [{"from": "human", "value": "First?"}, {"from": "gpt", "value": "1"}]
    talk += [{"from": "human", "value": "Second?"}, {"from": "gpt", "value": "2"}]
    lists = {key: [message[key] for message in talk] for key in ("from", "value")}
    images = pa.array([[{"bytes": png((n, 0, 0)), "path": None}] for n in range(2)], pa.list_(IMAGE))
    for name, cell in (("texts", pairs), ("talk", talk), ("turns", lists)):
        pq.write_table(pa.table({"images": images, name: [cell, cell]}), "set.parquet")
        assert main(["data", "check", "set.parquet", "--output_dir", "c"]) == 2
        assert f"--columns messages={name}" in capsys.readouterr().err
        (spec,) = parse_datasets("set.parquet", f"messages={name}")
        found = {sample.id: sample for split in SPLITS for sample in load_split(spec, split).samples}
        asked = [(s.question, s.target, [turn.text for turn in s.history]) for s in found.values()]
        assert asked == [("First?", "1", []), ("Second?", "2", ["First?", "1"])] * 2, name


def test_named_columns_stand_in_for_what_is_there() -> None:
    record = {"image": "a", "images": ["b"], "answers": ["c"], "messages": [], "img": "d", "q": "e", "a": "f"}
    found = renamed(record, {"image": "img", "question": "q", "answer": "a", "id": "gone"})
    assert {key: found[key] for key in ("image", "question", "answer")} == {
        "image": "d",
        "question": "e",
        "answer": "f",
    }
    assert not {"images", "answers", "messages", "id"} & found.keys()


def test_every_command_and_python_take_columns(folder: Path, capsys: Captured) -> None:
    pq.write_table(frame(0, 30), "set.parquet")
    Path("plain.jsonl").write_text('{"question": "2 and 2?", "answer": "4"}\n{"question": "1 and 1?", "answer": "2"}\n')
    given = ["--base_model", "pocket", "--columns", COLUMNS]
    short = ["--sft_config", "smoketest", "--max_steps", "2", "--eval_strategy", "no", "--max_eval", "2"]
    data = ["--dataset", "set.parquet,plain.jsonl:0.1", "--eval_benchmarks", "set.parquet"]
    assert main(["train", *given, *data, *short, "--output_dir", "run"]) == 0
    assert len(list(Path("run").glob("**/set/predictions.jsonl"))) == 2  # of base and tuned
    pq.write_table(frame(1, 30), "set.parquet")
    capsys.readouterr()
    assert main(["train", *given, *data, *short, "--output_dir", "run", "--resume"]) == 2
    assert "data" in capsys.readouterr().err
    ask = ["--benchmark", "set.parquet", "--limit", "2", "--output_dir", "e"]
    assert main(["eval", *given, *ask]) == 0
    named = dict(pair.split("=") for pair in COLUMNS.split(","))
    scores = vlm_sft.evaluate_model("pocket", benchmark="set.parquet", limit=2, output_dir="f", columns=named)
    assert scores["set"]["n"] == 2
    frame_ = frame(0, 12).to_pandas()
    frame_["img"] = [cell["bytes"] for cell in frame_["img"]]
    forecast = vlm_sft.plan(frame_, base_model="pocket", recipe="smoketest", columns=COLUMNS)
    assert forecast[0]["quantity"] == "time"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_read_shards_alike(folder: Path, warm: Warm) -> None:
    shard("a.tar", [(f"{n}{end}", data) for n in range(24) for end, data in sample(n)])
    Path("b.jsonl.zst").write_bytes(
        pa.compress(b'{"q": "1 and 1?", "a": "2"}\n{"q": "1 and 2?", "a": "3"}\n', codec="zstd", asbytes=True)
    )
    flags = ["--base_model", "pocket", "--sft_config", "smoketest", "--max_steps", "2", "--eval_strategy", "no"]
    data = ["--dataset", f"{folder}/*.tar,{folder}/b.jsonl.zst", "--columns", "question=q,answer=a"]
    both = warm.start_both(
        [*flags, *data, "--eval_benchmarks", "none", "--output_dir", str(folder / "two")], folder / "log"
    )
    assert both.wait(280) == 0, (folder / "log").read_text()
    assert main(["train", *flags, *data, "--eval_benchmarks", "none", "--output_dir", "one"]) == 0
    one, two = losses("one"), losses("two")
    assert one and two == pytest.approx(one, rel=1e-5)


def losses(run: str) -> list[float]:
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def sample(number: int) -> list[tuple[str, bytes]]:
    return [(".png", png((number, 0, 0))), (".json", json.dumps({"q": f"{number}?", "a": str(number)}).encode())]


def test_all_splits_of_a_set_are_read_alike(folder: Path) -> None:
    """A folder of parquet, what save_to_disk makes of it, and the Hub's own reader give the same samples."""
    rows = datasets.load_dataset("some/pictures")
    rows.save_to_disk("saved")
    places = ("some/pictures/data", "saved", "hub:some/pictures")
    found = []
    for place in places:
        (spec,) = parse_datasets(place, COLUMNS)
        parts = {split: load_split(spec, split).samples for split in SPLITS[:2]}
        found.append({split: [(s.question, s.target, s.image_key) for s in part] for split, part in parts.items()})
    assert found[1] == found[2]
    assert found[0]["validation"] == found[1]["validation"]

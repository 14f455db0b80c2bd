import dataclasses
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pictures import png
from vlm_sft.common.errors import DataError
from vlm_sft.data.sources import chartqa, hub
from vlm_sft.data.sources.hub import load_table
from vlm_sft.data.sources.registry import benchmark_split, load_split, parse_datasets

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "chartqa_real"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Converted parquet goes to the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_chartqa(path: Path, rows: list[tuple]) -> Path:
    columns = list(zip(*rows, strict=True))
    pq.write_table(
        pa.table(
            {
                "image": pa.array([{"bytes": data, "path": None} for data in columns[0]], IMAGE),
                "query": list(columns[1]),
                "label": pa.array(list(columns[2]), pa.list_(pa.string())),
                "human_or_machine": list(columns[3]),
            }
        ),
        path,
    )
    return path


def test_chartqa_rows(tmp_path):
    first, second = png("red"), png("blue")
    write_chartqa(tmp_path / "train-00000-of-00002.parquet", [(first, "How many? ", ["14", "15"], 0)])
    write_chartqa(
        tmp_path / "train-00001-of-00002.parquet",
        [
            (second, "Which?", ["A"], 1),
            (first, "Sum?", ["3"], 1),
            (second, "  ", ["A"], 0),
            (second, "None?", [], 0),
            (second, "Blank?", [""], 1),
            (second, "Part?", ["x"], 7),
        ],
    )
    write_chartqa(tmp_path / "val.parquet", [(second, "Val?", ["1"], 0)])
    loaded = load_split(parse_datasets(f"chartqa@{tmp_path}")[0], "train")
    assert [s.id for s in loaded.samples] == [f"chartqa/train/{n:06d}" for n in range(3)]
    one = loaded.samples[0]
    assert (one.question, one.target, one.answers, one.split) == ("How many?", "14", ("14", "15"), "human")
    assert [s.split for s in loaded.samples] == ["human", "augmented", "augmented"]
    assert loaded.samples[0].image_key == loaded.samples[2].image_key != loaded.samples[1].image_key
    assert [s.images[0].load() for s in loaded.samples] == [first, second, first]
    assert [item.reason for item in loaded.left_out] == [
        "empty question",
        "empty answer",
        "empty answer",
        "unknown part",
    ]
    assert "train-00001-of-00002.parquet row 2" in loaded.left_out[0].detail  # counted within its file
    assert pickle.loads(pickle.dumps(one)).images[0].load() == first  # what a spawned data loader worker needs

    test = load_split(parse_datasets(f"chartqa@{tmp_path}")[0], benchmark_split("chartqa"))
    assert [s.id for s in test.samples] == ["chartqa/validation/000000"]
    assert "validation split is used instead" in test.description


def test_images_beside_the_table(tmp_path):
    Image.new("RGB", (5, 4), "green").save(tmp_path / "g.png")
    pq.write_table(
        pa.table(
            {
                "image": pa.array([{"bytes": None, "path": "g.png"}, {"bytes": None, "path": "gone.png"}, None], IMAGE),
                "query": ["a?", "b?", "c?"],
                "label": [["1"], ["2"], ["3"]],
                "human_or_machine": [0, 0, 0],
            }
        ),
        tmp_path / "validation.parquet",
    )
    loaded = load_split(parse_datasets(f"chartqa@{tmp_path}")[0], "validation")
    assert loaded.samples[0].images[0].load() == (tmp_path / "g.png").read_bytes()
    assert [item.reason for item in loaded.left_out] == ["image missing", "image missing"]


def test_a_hub_repository_is_read_like_a_local_folder(tmp_path, monkeypatch):
    """The Hub reader on a repository folder on disk, after an id that does not exist."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    write_chartqa(folder / "train-00000-of-00001.parquet", [(png("red"), "a?", ["1"], 0), (png("red"), "b?", ["2"], 1)])
    source = dataclasses.replace(chartqa.SOURCE, hub_ids=("nobody/nothing", str(folder.parent)))
    loaded = load_table(source, parse_datasets("chartqa")[0], "train")
    assert [(s.id, s.target, s.split) for s in loaded.samples] == [
        ("chartqa/train/000000", "1", "human"),
        ("chartqa/train/000001", "2", "augmented"),
    ]
    assert loaded.samples[0].images[0].load() == png("red")
    assert f"from {folder.parent} train: 2 questions on 1 image" in loaded.description
    wrong = dataclasses.replace(source, hub_ids=(str(folder.parent),), columns=("query", "answer"))
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    with pytest.raises(DataError, match="no column 'answer' .it has: image, query"):
        load_table(wrong, parse_datasets("chartqa")[0], "train")


def write_textvqa(path: Path, answers: list[list[str]]) -> None:
    count = len(answers)
    pq.write_table(
        pa.table(
            {
                "image_id": [f"i{n}" for n in range(count)],
                "question_id": list(range(count)),
                "question": ["what?"] * count,
                "image": pa.array([{"bytes": png((n, 0, 0)), "path": None} for n in range(count)], IMAGE),
                "answers": answers,
                "ocr_tokens": [[]] * count,
                "set_name": ["x"] * count,
            }
        ),
        path,
    )


def test_textvqa_target_and_splits(tmp_path):
    ten = ["b", "a", "a", "b", "c", "", "", "", "", ""]  # a tie: the first wins, and empty ones never do
    write_textvqa(tmp_path / "train.parquet", [ten] * 40 + [["x"] * 9])
    write_textvqa(tmp_path / "validation.parquet", [["stop"] * 10] * 2)
    write_textvqa(tmp_path / "test.parquet", [[""] * 10] * 3)
    spec = parse_datasets(f"textvqa@{tmp_path}")[0]
    train, held = load_split(spec, "train"), load_split(spec, "validation")
    assert train.samples[0].target == "b" and len(train.samples[0].answers) == 10
    assert len(train.samples) == 39 and len(held.samples) == 1  # 3 % of 40 images
    assert held.samples[0].id.startswith("textvqa/train/")
    assert [item.reason for item in train.left_out + held.left_out] == ["not ten answers"]
    benchmark = load_split(spec, benchmark_split("textvqa"))
    assert [s.id for s in benchmark.samples] == ["textvqa/validation/000000", "textvqa/validation/000001"]


def test_easy_vqa_package():
    pytest.importorskip("easy_vqa")
    spec = parse_datasets("easy_vqa")[0]
    train, held, test = (load_split(spec, split) for split in ("train", "validation", "test"))
    assert len(train.samples) + len(held.samples) == 38_575 and len(test.samples) == 9_673
    assert not {s.image_key for s in train.samples} & {s.image_key for s in held.samples}
    assert 0.09 < len(held.samples) / 38_575 < 0.11
    assert {s.metadata["question_type"] for s in test.samples} == {"yes/no", "shape", "colour"}
    first = test.samples[0]
    assert (first.id, first.question, first.target) == ("easy_vqa/test/000000", "what is the red shape?", "triangle")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real ChartQA rows are not at {REAL}")
def test_real_chartqa_rows():
    spec = parse_datasets(f"chartqa@{REAL}")[0]
    train, validation = load_split(spec, "train"), load_split(spec, "validation")
    assert len(train.samples) + len(validation.samples) == 1667 and not train.left_out + validation.left_out
    assert len({s.image_key for s in train.samples + validation.samples}) == 1010
    assert train.samples[0].question == "What is the difference in value between Green bar and Orange bar?"
    assert train.samples[0].images[0].load().startswith(b"\x89PNG")
    assert {s.split for s in train.samples} == {"human", "augmented"}

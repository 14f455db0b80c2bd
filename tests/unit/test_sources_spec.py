import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_sft.common.errors import DataError
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets


def test_names_weights_and_aliases():
    assert parse_datasets("chartqa,textvqa") == [DatasetSpec("chartqa"), DatasetSpec("textvqa")]
    assert parse_datasets(" ChartQA:2 , textvqa:0.5") == [
        DatasetSpec("chartqa", None, 2.0),
        DatasetSpec("textvqa", None, 0.5),
    ]
    assert [s.name for s in parse_datasets("HuggingFaceM4/ChartQA,lmms-lab/textvqa:3,easy-vqa")] == [
        "chartqa",
        "textvqa",
        "easy_vqa",
    ]


def test_paths_with_and_without_weight(tmp_path):
    folder = tmp_path / "charts:v2"
    folder.mkdir()
    own = tmp_path / "mine.jsonl"
    own.write_text("{}\n")
    specs = parse_datasets(f"chartqa@{folder},{own}:2,zoo@{own}")
    assert specs == [DatasetSpec("chartqa", folder), DatasetSpec("mine", own, 2.0), DatasetSpec("zoo", own)]
    assert [spec.own for spec in specs] == [False, True, True]


def test_own_data_is_labelled_by_what_tells_it_apart(tmp_path):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text("{}\n")
        files.append(tmp_path / folder / "train.jsonl")
    shadow = tmp_path / "chartqa.jsonl"  # must not select ChartQA's metric
    shadow.write_text("{}\n")
    names = [s.name for s in parse_datasets(f"{files[0]},{files[1]},{shadow},{files[0]}")]
    assert names == ["a", "b", "chartqa_own", "a_2"]


def test_unknown_name_names_the_nearest():
    with pytest.raises(DataError, match="did you mean textvqa"):
        parse_datasets("textvq")


def test_all_mistakes_come_together(tmp_path):
    with pytest.raises(DataError) as caught:
        parse_datasets(
            f"chartqq:2,textvqa:-1,easy_vqa:two,,demo@{tmp_path},chartqa@/no/such/folder,{tmp_path}/gone.jsonl"
        )
    message = str(caught.value)
    for part in (
        "did you mean chartqa",
        "weight -1",
        "weight 'two'",
        "an entry is empty",
        "demo takes no path",
        "/no/such/folder does not exist",
        "gone.jsonl does not exist",
    ):
        assert part in message


@pytest.mark.parametrize(
    "text, part",
    [
        ("chartqa,chartqa", "named twice"),
        ("demo,demo_text", "demo already holds"),
        ("chartqa:nan", "positive"),
        ("chartqa:inf", "positive"),
        ("", "empty"),
    ],
)
def test_refused(text, part):
    with pytest.raises(DataError, match=part):
        parse_datasets(text)


def test_a_folder_of_parquet_asks_for_its_schema(tmp_path):
    pq.write_table(pa.table({"query": ["a"], "label": ["b"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="write chartqa@"):
        parse_datasets(str(tmp_path))
    with pytest.raises(DataError, match="give the path alone"):
        parse_datasets("chartqa@x.jsonl")


def test_sources_import_without_torch_and_datasets():
    code = (
        "import sys, vlm_sft.cli.data, vlm_sft.data.sources.registry, vlm_sft.data.mixture;"
        "import vlm_sft.data.preview;"
        "sys.exit(bool({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

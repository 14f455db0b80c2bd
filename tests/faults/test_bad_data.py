"""What a user sees when data is missing, broken or hostile: one clear message each."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import png
from tests.wording import line_with
from vlm_sft.cli import data as verb
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.data.audit import audit, check_images, enforce
from vlm_sft.data.sample import ImageRef, LeftOut, Sample
from vlm_sft.data.sources.registry import load_split, parse_datasets


def run_check(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(["check", *arguments]))


def write_own(folder: Path, good: int, bad: int) -> Path:
    (folder / "a.png").write_bytes(png("red"))
    (folder / "cut.png").write_bytes(png("blue", (300, 300))[:-60])
    lines = [{"image": "a.png", "question": f"q{n}", "answer": "a", "split": "train"} for n in range(good)]
    lines += [{"image": "cut.png", "question": f"b{n}", "answer": "a", "split": "train"} for n in range(bad)]
    lines.append({"image": "a.png", "question": "v", "answer": "a", "split": "val"})
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_missing_columns_are_named_with_those_there(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "question": ["q"], "label": [["a"]]}), tmp_path / "train.parquet")
    with pytest.raises(DataError) as caught:
        load_split(parse_datasets(f"chartqa@{tmp_path}")[0], "train")
    message = str(caught.value)
    assert line_with(message, f"{tmp_path}/train.parquet", "no column 'query'", "image, question, label")
    assert "no column 'human_or_machine'" in message and line_with(message, "fix: ", "image, query")


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="train.parquet cannot be read as parquet"):
        load_split(parse_datasets(f"chartqa@{tmp_path}")[0], "train")


def test_a_cut_parquet_file(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"query": ["q" * 1000] * 10}), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_split(parse_datasets(f"chartqa@{path}")[0], "train")


def test_an_image_column_of_numbers(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(
        pa.table({"image": [1], "query": ["q"], "label": [["a"]], "human_or_machine": [0]}), tmp_path / "train.parquet"
    )
    with pytest.raises(DataError, match="column 'image' is .*not images"):
        load_split(parse_datasets(f"chartqa@{tmp_path}")[0], "train")


def test_a_missing_split_says_what_there_is(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="has no train split .it has: test"):
        load_split(parse_datasets(f"chartqa@{tmp_path}")[0], "train")
    with pytest.raises(DataError, match="without public answers"):
        load_split(parse_datasets(f"textvqa@{tmp_path}")[0], "test")


@pytest.mark.parametrize("name, offline", [("chartqa", "0"), ("textvqa", "1")])
def test_no_network_is_answered_within_seconds(tmp_path, name, offline):
    code = (
        "import sys; from vlm_sft.data.sources.registry import *; from vlm_sft.common.errors import DataError\n"
        f"try: load_split(parse_datasets('{name}')[0], 'train')\n"
        "except DataError as error: sys.stdout.write(str(error))"
    )
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": offline,
    }
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert time.monotonic() - start < 30  # most of it is the import on a busy machine; retries alone would take 23 s
    assert "cannot be reached" in done.stdout and f"pass {name}@FOLDER" in done.stdout and "HF_HOME" in done.stdout
    assert "Retrying" not in done.stderr


def test_easy_vqa_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match=r"pip install vlm-sft\[easy-vqa\]"):
        load_split(parse_datasets("easy_vqa")[0], "train")


def test_check_images_names_what_cannot_be_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png())
    refs = [ImageRef.from_path(path), ImageRef.from_bytes(b"junk", "row 7")]
    path.unlink()
    refs.append(ImageRef.from_bytes(png("red"), "fine"))
    samples = [Sample(f"d/{n}", "d", "", (ref,), "q", "a", ("a",)) for n, ref in enumerate(refs * 2)]
    sound, left = check_images(samples)
    assert [s.id for s in sound] == ["d/2", "d/5"] and sound[0].images[0].width == 12
    assert [item.id for item in left] == ["d/0", "d/1", "d/3", "d/4"]
    assert str(path) in left[0].detail and "row 7" in left[1].detail
    report = audit(sound, left)
    assert (report.samples, report.images, report.questions_per_image) == (2, 1, {2: 1})
    assert report.left_out == {"image cannot be read": 4} and report.left_out_fraction == pytest.approx(4 / 6)


def test_enforce_draws_the_line_at_the_fraction():
    left = [LeftOut("d/1", "empty answer", "f line 1"), LeftOut("d/2", "image missing", "f line 2")]
    enforce(left, 200)
    enforce(left, 2, 1.0)
    enforce([], 0, 0.0)
    with pytest.raises(DataError) as caught:
        enforce(left, 199, left_out_file="run/left_out.jsonl")
    for part in ("2 of 199", "empty answer: 1", "d/2: f line 2", "run/left_out.jsonl", "--max_left_out 0.02"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="not between 0 and 1"):
        enforce([], 1, 5)


def test_check_writes_files_then_refuses(tmp_path, capsys):
    path = write_own(tmp_path, good=95, bad=5)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="5 of 100 samples .5.0%. cannot be used"):
        run_check(str(path), "--output_dir", str(out))
    rows = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and rows[0]["reason"] == "image cannot be read" and "own.jsonl line 96" in rows[0]["detail"]
    assert run_check(str(path), "--output_dir", str(out), "--max_left_out", "0.05", "--split", "all") == 0
    said = capsys.readouterr().out
    assert f"preview with pictures: {out}/preview.html" in said and "next: vlm-sft train" in said
    data = json.loads((out / "data.json").read_text())
    assert (data["samples"], data["images"], data["loaded"], data["left_out"]) == (
        96,
        1,
        101,
        {"image cannot be read": 5},
    )
    assert data["questions_per_image"] == {"96": 1} and data["synthetic"] is False


def test_a_limit_keeps_images_whole_and_the_share_true(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png((number, 0, 0)))
    lines = [{"image": f"{n % 30}.png", "question": f"q{n}", "answer": "a", "split": "train"} for n in range(120)]
    lines.append({"image": "0.png", "question": "v", "answer": "a", "split": "val"})
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    out = tmp_path / "out"
    assert run_check(str(path), "--output_dir", str(out), "--limit", "20") == 0  # 1 of 121, not 1 of 21
    data = json.loads((out / "data.json").read_text())
    assert (data["samples"], data["questions_per_image"], data["loaded"]) == (20, {"4": 5}, 121)
    with pytest.raises(DataError, match="--limit 0 is below 1"):
        run_check(str(path), "--limit", "0")


def test_hostile_text_is_shown_as_text(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red", (900, 500)))
    attack = '<script>alert("x")</script><img src=http://x onerror=1>{{ 7*7 }}'
    rows = [
        {"image": "a.png", "question": attack, "answer": attack, "split": part, "id": '"><u>'}
        for part in ("train", "val")
    ]
    rows += [{"image": "a.png", "question": "q", "answer": "a", "split": "<i>part</i>"}] * 3
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run_check(str(path), "--output_dir", str(out))
    page = (out / "preview.html").read_text()
    assert "<script" not in page and "onerror=1>" not in page and "<i>part" not in page and '"><u>' not in page
    assert "&lt;script&gt;" in page and "onerror=1&gt;{{ 7*7 }}" in page and "onerror=1&gt;49" not in page
    assert "data:image/jpeg;base64," in page and "prefers-color-scheme: dark" in page and "<link" not in page
    assert len(page) < 100_000  # thumbnails, not the pictures


def test_an_output_folder_that_cannot_be_written(tmp_path):
    path = write_own(tmp_path, good=3, bad=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        run_check(str(path), "--output_dir", str(tmp_path / "file" / "out"))


def test_check_of_generated_data_says_synthetic(tmp_path, capsys):
    out = tmp_path / "out"
    assert run_check("demo", "--limit", "12", "--output_dir", str(out)) == 0
    data = json.loads((out / "data.json").read_text())
    assert data["synthetic"] is True and data["datasets"] == {"demo_charts": 6, "demo_text": 6}
    assert "synthetic" in capsys.readouterr().out and "synthetic" in (out / "preview.html").read_text()

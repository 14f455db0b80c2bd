"""Data sets in and out: `vlm-sft data import` and `data export` through the command line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.registry import load_split, parse_datasets

LAYOUTS = ("trl", "llamafactory", "msswift", "jsonl")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def content(sample: Sample) -> tuple[Any, ...]:
    """Everything that is trained on and scored, without the names of files and data sets."""
    return (
        sample.id.partition("/")[2],
        sample.question,
        sample.target,
        sample.answers,
        sample.history,
        sample.system,
        sample.split,
        tuple(image.load() for image in sample.images),
        sample.places,
    )


def contents(path: Path, split: str = "train") -> list[tuple[Any, ...]]:
    return [content(sample) for sample in load_split(parse_datasets(str(path))[0], split).samples]


@pytest.fixture()
def own(tmp_path: Path) -> Path:
    """Data of ours: one image with two questions, several answers, two images, a conversation, a system text."""
    folder = tmp_path / "own"
    (folder / "pictures").mkdir(parents=True)
    for colour in ("red", "blue"):
        (folder / "pictures" / f"{colour}.png").write_bytes(png(colour))
    red, blue = "pictures/red.png", "pictures/blue.png"
    turns = [{"role": "user", "content": "Färbe?"}, {"role": "assistant", "content": "rot"}]
    write(
        folder / "train.jsonl",
        [
            {"id": "a", "image": red, "question": 'Which colour, "exactly"?', "answer": "red"},
            {
                "id": "b",
                "image": red,
                "question": "How\nmany?",
                "answer": "1",
                "answers": ["1", "1", "one"],
                "split": "human",
            },
            {"id": "c", "images": [red, blue], "question": "Same?", "answer": "no", "system": "Be brief."},
            {"id": "d", "image": blue, "question": "Und jetzt?", "answer": "blau", "history": turns},
        ],
    )
    write(folder / "validation.jsonl", [{"id": "e", "image": blue, "question": "Which?", "answer": "blue"}])
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_in_again_is_the_same(layout: str, own: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["data", "export", str(own), "--format", layout, "--output", str(out)]) == 0
    assert len(list((out / "images").iterdir())) == 2  # each picture once
    assert main(["data", "import", str(out), "--format", layout, "--output", str(back)]) == 0
    assert contents(back) == contents(own)
    assert contents(back, "validation") == contents(own, "validation")
    facts = json.loads((back / "import.json").read_text())
    assert (facts["questions"], facts["left_out"]) == ({"train": 4, "validation": 1}, {})
    assert (out / "changed.jsonl").exists() == (layout == "llamafactory")  # it learns the earlier answer too


def test_trl_parquet_opens_with_datasets(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "out"
    assert main(["data", "export", str(own), "--format", "trl", "--output", str(out)]) == 0
    row = datasets.Dataset.from_parquet(str(out / "train.parquet"))[2]
    assert [picture.getpixel((0, 0)) for picture in row["images"]] == [(255, 0, 0), (0, 0, 255)]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert [part["type"] for part in row["prompt"][1]["content"]] == ["image", "image", "text"]
    assert row["completion"][0]["content"][0]["text"] == "no"


def test_a_folder_of_parquet_shards_is_a_data_set(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert main(["data", "export", str(own), "--format", "trl", "--output", str(out)]) == 0
    assert [item[1:] for item in contents(out)][0] == contents(own)[0][1:]
    assert len(contents(out)) == 4 and len(contents(out, "validation")) == 1
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(2):
        table = pa.table(
            {"image": [png("red"), png((number, 9, 9))], "question": ["q?", "r?"], "answers": [["x"], ["y", "z", "z"]]}
        )
        pq.write_table(table, plain / f"part-{number}.parquet", row_group_size=1)
    samples = load_split(parse_datasets(str(plain))[0], "train").samples
    for split in ("validation", "test"):
        samples += load_split(parse_datasets(str(plain))[0], split).samples
    assert sorted(sample.target for sample in samples) == ["x", "x", "z", "z"]
    assert len({sample.image_key for sample in samples}) == 3
    assert main(["data", "check", f"mine@{plain / 'part-0.parquet'}", "--output_dir", str(tmp_path / "check")]) == 0


def test_llamafactory_alpaca_and_dataset_info(own: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    flags = ["--format", "llamafactory", "--style", "alpaca", "--output", str(out)]
    assert main(["data", "export", str(own), *flags]) == 2  # one of five: the conversation
    assert [item["id"] for item in lines(out / "left_out.jsonl")] == ["own/d"]
    assert [path.name for path in out.iterdir()] == ["left_out.jsonl"]
    assert main(["data", "export", str(own), *flags, "--max_left_out", "0.2"]) == 0
    assert main(["data", "import", str(out), "--format", "llamafactory", "--output", str(back)]) == 0
    assert contents(back) == contents(own)[:3]
    named = tmp_path / "named"
    (named / "media").mkdir(parents=True)
    (named / "media" / "x.png").write_bytes(png("red"))
    (named / "set.json").write_text(
        json.dumps(
            [
                {
                    "talk": [{"wer": "mensch", "was": "<image>Was?"}, {"wer": "maschine", "was": "Rot"}],
                    "bilder": ["media/x.png"],
                }
            ]
        )
    )
    (named / "dataset_info.json").write_text(
        json.dumps(
            {
                "meins": {
                    "file_name": "set.json",
                    "formatting": "sharegpt",
                    "columns": {"messages": "talk", "images": "bilder"},
                    "tags": {
                        "role_tag": "wer",
                        "content_tag": "was",
                        "user_tag": "mensch",
                        "assistant_tag": "maschine",
                    },
                }
            }
        )
    )
    assert main(["data", "import", str(named), "--format", "llamafactory", "--output", str(tmp_path / "n")]) == 0
    assert [(row["question"], row["answer"]) for row in lines(tmp_path / "n" / "train.jsonl")] == [("Was?", "Rot")]


def test_what_is_dropped_or_changed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "a.png").parent.mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")

    def talk(*turns: str, **more: Any) -> dict[str, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
        return {"messages": messages, "images": ["a.png"]} | more

    source = write(
        tmp_path / "in" / "set.jsonl",
        [
            talk("<image>one?", "1", "two?", "2"),
            talk("look: <image> what?", "3"),
            talk("<image>x", "4", images=["broken.png"]),
            talk("<image>x", "4", images=["gone.png"]),
            talk("<image><video>x", "5"),
            talk("<image>x", "6", tools=[{"name": "t"}]),
            talk("<image>x", "7", rejected_response="8"),
            {"query": "<image>old?", "response": "yes", "history": [["before?", "so"]], "images": ["a.png"]},
            talk("x", "9", images=["https://example.org/a.png"]),
            talk("<image>x", ""),
        ],
    )
    out = tmp_path / "out"
    flags = ["data", "import", str(source), "--format", "msswift", "--output", str(out), "--max_left_out", "1"]
    assert main(flags) == 0
    rows = lines(out / "train.jsonl")
    name = f"images/{next((out / 'images').iterdir()).name}"
    assert [(row["id"], row.get("image"), row.get("answer"), len(row.get("history", []))) for row in rows] == [
        ("set/000001/turn1", name, "1", 0),
        ("set/000001/turn2", name, "2", 2),
        ("set/000002", None, None, 0),
        ("set/000008/turn1", None, "so", 0),
        ("set/000008/turn2", None, None, 0),
    ]
    placed = [
        [*turn["content"]] for row in rows if "messages" in row for turn in row["messages"] if turn["role"] == "user"
    ]
    image = {"type": "image", "image": name}
    words = [{"type": "text", "text": text} for text in ("look: ", " what?", "before?", "old?")]
    assert placed == [[words[0], image, words[1]], [words[2]], [image, words[3]]]
    assert json.loads((out / "import.json").read_text())["left_out"] == {
        "image cannot be read": 1,
        "image missing": 1,
        "video": 1,
        "record with tools": 1,
        "preference record": 1,
        "image is a URL": 1,
        "empty answer": 1,
    }
    gone = {row["reason"]: row["detail"] for row in lines(out / "left_out.jsonl")}
    assert "set.jsonl line 4" in gone["image missing"] and "--allow_image_urls" in gone["image is a URL"]
    # The image of a second turn stands behind words too; the first turn does not see it.
    assert not (out / "changed.jsonl").exists()
    capsys.readouterr()
    assert main(flags) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*flags[:-3], str(tmp_path / "strict")]) == 2  # seven of thirteen are more than one in a hundred
    fix = re.search("--max_left_out [0-9.]+", capsys.readouterr().err)
    assert fix and [path.name for path in (tmp_path / "strict").iterdir()] == ["left_out.jsonl"]
    assert main([*flags[:-3], str(tmp_path / "strict"), *fix[0].split()]) == 0  # the limit that the message proposes
    assert contents(tmp_path / "strict") == contents(tmp_path / "out")


def test_answers_without_loss_are_context(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    messages = [
        {"role": "user", "content": "<image>one?"},
        {"role": "assistant", "content": "1", "loss": False},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2", "loss": True},
    ]
    source = write(tmp_path / "set.jsonl", [{"messages": messages, "images": ["a.png"]}] * 3)
    assert main(["data", "import", str(source), "--format", "msswift", "--output", str(tmp_path / "out")]) == 0
    assert [(r["question"], len(r["history"])) for r in lines(tmp_path / "out" / "train.jsonl")] == [("two?", 2)] * 3


def test_a_csv_and_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "scan 1.png").write_bytes(png("red"))
    (pictures / "scan 2.jpg").write_bytes(png("blue"))
    table = tmp_path / "questions.csv"
    table.write_text(
        '\ufeffPicture;Question;Label;split\nscan 1.png;"How many;\nreally?";3;\n'
        "scan 2;Colour?;blue;human\nscan 1.png;only three\nscan 9.png;x;y;\n",
        encoding="utf-8",
    )
    flags = ["data", "import", str(table), "--format", "csv", "--images", str(pictures)]
    assert main([*flags, "--output", str(tmp_path / "out"), "--max_left_out", "0.5"]) == 0
    rows = lines(tmp_path / "out" / "train.jsonl")
    assert [(row["question"], row["answer"], row.get("split")) for row in rows] == [
        ("How many;\nreally?", "3", None),
        ("Colour?", "blue", "human"),
    ]
    assert [row["reason"] for row in lines(tmp_path / "out" / "left_out.jsonl")] == ["broken CSV row", "image missing"]
    assert "vlm-sft train --dataset" in capsys.readouterr().out
    assert [content(s)[1] for s in load_split(parse_datasets(str(tmp_path / "out"))[0], "train").samples]
    table.write_text("bild,frage,antwort\nscan 1.png,Was?,rot\n", encoding="utf-8")
    assert main([*flags, "--output", str(tmp_path / "no")]) == 2
    assert "no columns for image, question and answer (it has: bild, frage, antwort)" in capsys.readouterr().err
    named = ["--columns", "image=bild,question=frage,answer=antwort", "--output", str(tmp_path / "named")]
    assert main([*flags, *named]) == 0
    assert lines(tmp_path / "named" / "train.jsonl")[0]["answer"] == "rot"


def test_csv_out(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["data", "export", str(own), "--format", "csv", "--output", str(out), "--max_left_out", "1"]) == 0
    with (out / "train.csv").open(encoding="utf-8", newline="") as stream:
        assert [row["question"] for row in csv.DictReader(stream)] == ['Which colour, "exactly"?']
    reasons = [row["reason"] for row in lines(out / "left_out.jsonl")]
    assert reasons == ["several answers", "several images", "conversation"]


def test_the_mark_as_a_word_survives_or_is_named(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.png").write_bytes(png("red"))
    write(
        own / "train.jsonl",
        [
            {"id": "answer", "image": "a.png", "question": "What tag?", "answer": "The <image> tag."},
            {"id": "question", "image": "a.png", "question": "What does the <image> tag do?", "answer": "it shows"},
            {"id": "control", "image": "a.png", "question": "Is <|im_end|> one?", "answer": "</s> too"},
        ],
    )
    write(own / "val.jsonl", [{"id": "v", "image": "a.png", "question": "v?", "answer": "v"}])
    for layout in LAYOUTS:
        out, back = tmp_path / layout, tmp_path / f"{layout}_back"
        assert main(["data", "export", str(own), "--format", layout, "--output", str(out), "--max_left_out", "1"]) == 0
        assert main(["data", "import", str(out), "--format", layout, "--output", str(back)]) == 0
        gone = {row["id"].rpartition("/")[2]: row["reason"] for row in lines(out / "left_out.jsonl")}
        # There an image is placed by the mark wherever it stands, so these two cannot be said.
        named = {"answer", "question"} if layout in ("llamafactory", "msswift") else set()
        assert gone == dict.fromkeys(named, "text holds the image mark")
        kept = [one for one in contents(own) if one[0] not in named]
        assert sorted(contents(back)) == sorted(kept)


def test_a_question_that_a_plain_record_cannot_say_becomes_messages(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    parts = [{"type": "image"}, {"type": "text", "text": "<image> is what?"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a tag"}]
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    records = [{"messages": turns, "images": ["../a.png"]} for turns in (talk, plain)]
    source = write(tmp_path / "in" / "train.jsonl", records)
    write(tmp_path / "in" / "val.jsonl", records[1:])
    out = tmp_path / "out"
    flags = ["--output", str(out), "--max_left_out", "0.5"]
    assert main(["data", "import", str(source.parent), "--format", "trl", *flags]) == 0
    assert [sorted(row) for row in lines(out / "train.jsonl")] == [
        ["id", "messages"],
        ["answer", "id", "image", "question"],
    ]
    assert [one[1] for one in contents(out)] == ["<image> is what?", "What?"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_keep_their_places(layout: str, tmp_path: Path) -> None:
    """Between words, behind them, and in a later turn: out in every layout and in again, and in the other style."""
    own = tmp_path / "own"
    own.mkdir()
    for colour in ("red", "blue"):
        (own / f"{colour}.png").write_bytes(png(colour))
    said = {"role": "assistant", "content": "red"}
    asked = [("Same as <image>\nor <image>?", "Why?"), ("Colour of this?\n<image>", "And <image>?")]
    talks = [
        [{"role": "user", "content": one}, said, {"role": "user", "content": two}, said | {"content": "blue"}]
        for one, two in asked
    ]
    rows = [{"id": f"t{n}", "messages": talk, "images": ["red.png", "blue.png"]} for n, talk in enumerate(talks)]
    rows += [
        {"id": "p", "images": ["blue.png", "red.png"], "question": "Is <image> redder than <image>?", "answer": "no"}
    ]
    write(own / "train.jsonl", rows)
    write(own / "val.jsonl", rows[-1:])
    before = contents(own)
    assert [one[-1] for one in before] == [
        ((0, 8), (0, 12)),
        ((0, 8), (0, 12)),
        ((0, 16),),
        ((0, 16), (2, 4)),
        ((0, 3), (0, 16)),
    ]
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["data", "export", str(own), "--format", layout, "--output", str(out)]) == 0
    assert main(["data", "import", str(out), "--format", layout, "--output", str(back)]) == 0
    assert contents(back) == before
    if layout == "llamafactory":
        flags = ["--style", "alpaca", "--max_left_out", "1", "--output", str(tmp_path / "alpaca")]
        assert main(["data", "export", str(own), "--format", layout, *flags]) == 0
        assert lines(tmp_path / "alpaca" / "left_out.jsonl")[0]["reason"] == "conversation"
        told = json.loads((tmp_path / "alpaca" / "train.json").read_text())
        assert told[-1]["instruction"] == "Is <image> redder than <image>?"

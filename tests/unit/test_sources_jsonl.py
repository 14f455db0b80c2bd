import base64
import json
from pathlib import Path

import pytest

from tests.pictures import png
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.common.artifacts import read_jsonl
from vlm_sft.common.errors import DataError, InterruptedRunError
from vlm_sft.data.audit import audit, check_images
from vlm_sft.data.preview import count_rows
from vlm_sft.data.sample import Turn
from vlm_sft.data.sources.registry import load_split, parse_datasets


def write(path: Path, records: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def load(path: Path, split: str = "train"):
    return load_split(parse_datasets(str(path))[0], split)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").write_bytes(png("red", (30, 20)))
    (tmp_path / "images" / "b.png").write_bytes(png("blue"))
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "a.png", "question": "v?", "answer": "v"}) + "\n")
    return tmp_path


def test_four_formats_in_one_file(folder):
    path = write(
        folder / "train.jsonl",
        [
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                ],
                "images": ["a.png"],
            },
            {
                "id": "llava7",
                "image": "b.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "a square"},
                    {"from": "human", "value": "Colour?"},
                    {"from": "gpt", "value": "blue"},
                ],
            },
            {"prompt": "How many <image> shapes?", "completion": "1", "image": "a.png"},
            {
                "prompt": [{"role": "user", "content": "Size?"}],
                "completion": [{"role": "assistant", "content": "big"}],
                "images": ["a.png", "b.png"],
            },
            {"image": "a.png", "question": "Count?", "answers": ["2", "3", "3"], "split": "hard"},
            {"image": {"bytes": base64.b64encode(png("red", (30, 20))).decode()}, "question": "Number?", "answer": 14},
            {
                "image": "data:image/png;base64," + base64.b64encode(png("blue")).decode(),
                "question": "URI?",
                "answer": "ok",
            },
        ],
    )
    loaded = load(path)
    name = folder.name
    assert not loaded.left_out
    got = [(s.id, s.question, s.target, s.split) for s in loaded.samples]
    assert got == [
        (f"{name}/train/000001", "What colour?", "red", ""),
        (f"{name}/llava7/turn1", "What is it?", "a square", ""),
        (f"{name}/llava7/turn2", "Colour?", "blue", ""),
        (f"{name}/train/000003", "How many  shapes?", "1", ""),
        (f"{name}/train/000004", "Size?", "big", ""),
        (f"{name}/train/000005", "Count?", "3", "hard"),
        (f"{name}/train/000006", "Number?", "14", ""),
        (f"{name}/train/000007", "URI?", "ok", ""),
    ]
    samples = loaded.samples
    assert samples[0].system == "Be brief." and samples[0].images[0].width == 30
    assert samples[2].history == (Turn("user", "What is it?"), Turn("assistant", "a square"))
    assert len(samples[4].images) == 2 and samples[5].answers == ("2", "3", "3")
    assert samples[6].image_key == samples[0].image_key  # the same bytes by another way
    assert samples[7].image_key == samples[1].image_key


def test_a_turn_sees_only_the_images_shown_so_far(folder):
    path = write(
        folder / "train.jsonl",
        [
            {
                "images": ["a.png", "b.png"],
                "messages": [
                    {"role": "user", "content": "<image>First?"},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": "<image>Second?"},
                    {"role": "assistant", "content": "2"},
                ],
            },
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "a.png"},
                            {"type": "image_url", "image_url": {"url": "b.png"}},
                            {"type": "text", "text": "Both?"},
                        ],
                    },
                    {"role": "assistant", "content": "yes"},
                ]
            },
        ],
    )
    assert [len(s.images) for s in load(path).samples] == [1, 2, 2]


BAD = [
    ('{"image": "a.png", "question": ', "broken JSON line"),
    ({"image": "gone.png", "question": "q", "answer": "a"}, "image missing"),
    ({"image": "cut.png", "question": "q", "answer": "a"}, "image cannot be read"),
    ({"image": "https://x.org/a.png", "question": "q", "answer": "a"}, "image is a URL"),
    ({"image": "a.png", "question": " <image> ", "answer": "a"}, "empty question"),
    ({"image": "a.png", "question": "q", "answer": ""}, "empty answer"),
    ({"image": "a.png", "question": "q", "answers": []}, "empty answer"),
    ({"image": "a.png", "question": "q"}, "missing key"),
    ({"picture": "a.png", "text": "q"}, "missing key"),
    ({"picture": "a.png", "question": "q", "answer": "a"}, "no image"),
    ({"question": "<image>q", "answer": "a"}, "no image"),
    ({"image": "a.png", "question": "q", "answer": True}, "answer is not text"),
    ('{"image": "a.png", "question": "q", "answer": NaN}', "answer is not text"),
    ('{"image": "a.png", "question": "q", "answer": "\\ud800"}', "answer is not valid Unicode"),
    ('{"image": "a\\u0000.png", "question": "q", "answer": "a"}', "image missing"),
    ({"image": {"bytes": "%%%"}, "question": "q", "answer": "a"}, "image cannot be read"),
    (
        {
            "image": ["a.png"],
            "conversations": [{"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "a"}],
        },
        "more placeholders than images",
    ),
    ({"image": "a.png", "conversations": [{"from": "human", "value": "q"}]}, "missing answer"),
    ({"image": "a.png", "conversations": [{"from": "robot", "value": "q"}]}, "unknown role"),
    ({"image": "a.png", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
    ({"image": "a.png", "messages": "hello"}, "missing key"),
    ("[1, 2]", "not a record"),
    ('{"image": "a.png", "question": "q", "answer": ' + "9" * 5000 + "}", "broken JSON line"),
    ("[" * 100_000, "broken JSON line"),
]


@pytest.mark.parametrize("record, reason", BAD, ids=[f"{n}-{reason}" for n, (_, reason) in enumerate(BAD)])
def test_each_bad_line_is_left_out_with_its_place(folder, record, reason):
    (folder / "cut.png").write_bytes(png("red", (200, 200))[:-40])
    good = {"image": "a.png", "question": "q", "answer": "a"}
    path = write(folder / "train.jsonl", [good, record, good])
    loaded = load(path)
    assert [s.id[-6:] for s in loaded.samples] == ["000001", "000003"]
    assert [item.reason for item in loaded.left_out] == [reason]
    assert loaded.left_out[0].detail.startswith(f"{path} line 2: ")
    loaded.left_out[0].detail.encode("utf-8")


VQA_ANSWERS = [
    {"answer": text, "answer_confidence": sure, "answer_id": number}
    for number, (text, sure) in enumerate([("2", "maybe"), ("3", "yes"), ("3", "yes"), (4, "no")], start=1)
]


def test_answer_objects_as_vqav2_and_vizwiz_write_them(folder, capsys):
    asked = {"image": "a.png", "question": "Count?"}
    path = write(
        folder / "train.jsonl",
        [asked | {"answers": VQA_ANSWERS}, asked | {"answer": VQA_ANSWERS[0]}, asked | {"answer": VQA_ANSWERS}],
    )
    samples = load(path).samples
    assert [sample.answers for sample in samples] == [("2", "3", "3", "4"), ("2",), ("2", "3", "3", "4")]
    assert [sample.target for sample in samples] == ["3", "2", "3"]
    write(path, [asked | {"answers": [{"text": "2"}]}, asked | {"answers": [{"answer": " "}]}, asked | {"answer": "2"}])
    loaded = load(path)
    assert [item.reason for item in loaded.left_out] == ["answer is not text", "empty answer"]
    write(path, [asked | {"answers": VQA_ANSWERS}])
    assert main(["data", "check", str(path), "--split", "train"]) == 0
    assert "1 question on 1 image" in "".join(capsys.readouterr())


def test_a_turn_before_the_first_image_is_a_text_row(folder):
    says = [("user", "Hello"), ("assistant", "hi"), ("user", "<image>What?"), ("assistant", "a")]
    talk = {"images": ["a.png"], "messages": [{"role": role, "content": text} for role, text in says]}
    loaded = load(write(folder / "train.jsonl", [talk]))
    assert [(sample.question, len(sample.images)) for sample in loaded.samples] == [("Hello", 0), ("What?", 1)]
    assert not loaded.left_out


def test_rows_without_an_image_are_text_rows(folder):
    records = [
        {"question": "Capital of France?", "answer": "Paris"},
        {"image": None, "question": "Sum?", "answer": "4"},
        {"images": [], "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"image": "a.png", "question": "Colour?", "answer": "red"},
    ]
    loaded = load(write(folder / "train.jsonl", records))
    assert [(sample.target, len(sample.images)) for sample in loaded.samples] == [
        ("Paris", 0),
        ("4", 0),
        ("Hello", 0),
        ("red", 1),
    ]
    assert "1 question on 1 image, 3 text rows" in loaded.description
    report = audit(loaded.samples)
    assert (report.samples, report.images, report.text_rows) == (4, 1, 3)
    assert ("text rows, without an image", "3") in count_rows(report)


def test_text_rows_of_one_opening_are_held_out_together(folder):
    talks = [
        [("user", f"Topic {topic}"), ("assistant", "yes"), ("user", f"More {more}?"), ("assistant", "no")]
        for topic in range(20)
        for more in range(2)
    ]
    records = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    path = write(folder / "all.jsonl", records)
    openings = [{sample.subject for sample in load(path, split).samples} for split in ("train", "validation", "test")]
    assert [len(part) for part in openings] == [16, 2, 2]
    assert len(set.union(*openings)) == 20


def test_not_utf8_and_byte_order_mark(folder):
    good = json.dumps({"image": "a.png", "question": "é?", "answer": "a"}, ensure_ascii=False)
    path = folder / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good.encode() + b"\r\n\n" + good.encode("latin-1") + b"\n")
    loaded = load(path)
    assert [s.question for s in loaded.samples] == ["é?"]
    assert [(i.reason, "line 3" in i.detail) for i in loaded.left_out] == [("line is not UTF-8", True)]


def test_no_usable_line_shows_three_reasons(folder):
    path = write(
        folder / "train.jsonl",
        ["{", {"question": "<image>q", "answer": "a"}, {"image": "gone.png", "question": "q", "answer": "a"}, "{"],
    )
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "none of its 4 samples" in message and message.count("\n  - ") == 3 and "line 1" in message
    with pytest.raises(DataError, match="it is empty"):
        load(write(folder / "train.jsonl", [""]))


def test_json_list(folder):
    path = folder / "list.json"
    records = [{"image": "a.png", "question": f"q{n}", "answer": "a"} for n in range(3)] + [{"x": 1}]
    path.write_text(json.dumps(records, indent=1))
    (folder / "images" / "c.png").write_bytes(png("green"))
    loaded = load(path)
    assert [s.question for s in loaded.samples] == ["q0", "q1", "q2"]
    assert "list.json item 4" in loaded.left_out[0].detail
    path.write_text("[{]")
    with pytest.raises(DataError, match="list.json is not JSON"):
        load(path)


def test_single_file_holds_out_by_image(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png((number * 10, 0, 0)))
    path = write(
        tmp_path / "pairs.jsonl", [{"image": f"{n % 20}.png", "question": f"q{n}", "answer": "a"} for n in range(60)]
    )
    train, held, test = (load(path, split) for split in ("train", "validation", "test"))
    assert (len(train.samples), len(held.samples), len(test.samples)) == (48, 6, 6)  # 2 of 20 images each
    seen = [{s.image_key for s in part.samples} for part in (train, held, test)]
    assert len(set().union(*seen)) == 20 == sum(map(len, seen))
    assert line_with(train.description, "48 questions on 16 images", "validation and test", "held out")


def test_a_shared_reference_ties_nothing_and_a_chain_says_what_does(tmp_path):
    for number in range(21):
        (tmp_path / f"{number}.png").write_bytes(png((number * 10, 0, 0)))
    beside = write(
        tmp_path / "beside.jsonl",
        [{"images": ["20.png", f"{n % 20}.png"], "question": f"q{n}", "answer": "a"} for n in range(40)],
    )
    parts = [load(beside, split) for split in ("train", "validation", "test")]
    assert [len(part.samples) for part in parts] == [32, 4, 4]
    assert line_with(parts[0].description, "32 questions on 17 images", "validation and test", "(1 shown beside")
    chain = write(
        tmp_path / "chain.jsonl",
        [{"images": [f"{n}.png", f"{n + 1}.png"], "question": "q", "answer": "a"} for n in range(20)],
    )
    assert line_with(load(chain).description, "20 questions on 21 images", "none can be held out")
    with pytest.raises(DataError, match="21 images .* test .* 2 of 20 questions"):
        load(chain, "test")
    two = write(tmp_path / "two.jsonl", [{"image": f"{n}.png", "question": "q", "answer": "a"} for n in range(2)])
    assert line_with(load(two).description, "1 question on 1 image", "for validation are held out")


def test_data_of_one_image_says_how_to_train_on_it(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = write(tmp_path / "one.jsonl", [{"image": "a.png", "question": f"q{n}", "answer": "a"} for n in range(3)])
    assert line_with(load(path).description, "3 questions on 1 image", "none can be held out")
    with pytest.raises(DataError, match="one image .* validation") as told:
        load(path, "validation")
    assert "--eval_strategy no --eval_benchmarks none" in told.value.fix


def test_sibling_files_and_split_keys(folder):
    good = {"image": "a.png", "question": "q", "answer": "a"}
    write(folder / "x_train.jsonl", [good, good])
    write(folder / "x_dev.jsonl", [good])
    path = folder / "x_train.jsonl"
    assert len(load(path).samples) == 2 and len(load(path, "validation").samples) == 1
    keyed = write(folder / "keyed.jsonl", [good | {"split": word} for word in ("train", "val", "test")])
    assert [[s.id[-6:] for s in load(keyed, split).samples] for split in ("train", "validation", "test")] == [
        ["000001"],
        ["000002"],
        ["000003"],
    ]
    assert load(keyed).samples[0].split == ""


def test_folder_and_repeated_ids(folder):
    sub = folder / "sets"
    sub.mkdir()
    (sub / "images").mkdir()
    (sub / "images" / "a.png").write_bytes(png())
    record = {"image": "a.png", "question": "q", "answer": "a", "id": "same"}
    write(sub / "train.jsonl", [record, record])
    write(sub / "test.jsonl", [record])
    (sub / "settings.json").write_text('{"theme": "dark"}')
    loaded = load(sub)
    assert [s.id for s in loaded.samples] == ["sets/same", "sets/train/000002:same"] and not loaded.left_out
    assert len(load(sub, "test").samples) == 1


def test_a_key_that_comes_twice_is_no_answer(folder):
    line = '{"image": "a.png", "question": "q", "answer": "a", "answer": "b"}'
    path = write(folder / "own.jsonl", [line, {"image": "a.png", "question": "q", "answer": "a"}])
    (item,) = load(path).left_out
    assert item.reason == "broken JSON line" and "'answer'" in item.detail


def test_all_of_a_set_of_one_image_can_be_checked_and_exported(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "question": f"q{n}", "answer": "a" if n < 3 else ""} for n in range(9)]
    path, check = write(tmp_path / "one.jsonl", rows), tmp_path / "check"
    left = ["--max_left_out", "0.7"]
    assert main(["data", "check", str(path), "--split", "all", "--output_dir", str(check), *left]) == 0
    assert len(list(read_jsonl(check / "left_out.jsonl"))) == 6
    assert line_with(capsys.readouterr().out, "3 questions on 1 image", "none can be held out")
    out = tmp_path / "out"
    assert main(["data", "export", str(path), "--format", "csv", "--output", str(out), "--split", "all", *left]) == 0
    assert len((out / "train.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("interrupted", ["json.loads", "PIL.Image.open"])
def test_a_signal_in_the_middle_of_reading_is_no_fault_of_the_data(folder, monkeypatch, interrupted):
    def signalled(*arguments, **settings):
        raise InterruptedRunError("stopped by SIGINT")

    path = write(folder / "own.jsonl", [{"image": "a.png", "question": "q", "answer": "a"}])
    monkeypatch.setattr(interrupted, signalled)
    with pytest.raises(InterruptedRunError):
        check_images(load(path).samples)

"""Every kind of file that data comes in gives the same samples, through the command line where it matters."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from tests.pictures import png
from tests.shards import shard
from tests.wording import line_with
from vlm_sft.api.rows import dataset_argument
from vlm_sft.cli.main import main
from vlm_sft.common.errors import DataError
from vlm_sft.data.sources import compressed
from vlm_sft.data.sources.registry import SPLITS, load_split, parse_datasets
from vlm_sft.data.video import VIDEO

Captured = pytest.CaptureFixture[str]
PARTS = {"train": slice(4), "validation": slice(4, None)}
COLORS = ("red", "green", "blue", "black", "white", "gray")
TAR = tarfile.TarInfo


def no_network(*_: object) -> None:
    raise AssertionError("files of one's own are read without a network")


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    for color in COLORS:
        Path(f"{color}.png").write_bytes(png(color))
    return tmp_path


def lines(image: str = "image") -> bytes:
    rows = [{image: f"{color}.png", "question": "Which?", "answer": color} for color in COLORS]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def learned(place: str, columns: str | None = None) -> dict[str, tuple[str, bytes]]:
    """Question and picture by answer, over all splits of a data set; each sample stands in one of them."""
    (spec,) = parse_datasets(place, columns)
    samples = {sample.id: sample for split in SPLITS for sample in load_split(spec, split).samples}
    assert len(samples) == len({sample.target for sample in samples.values()})
    return {sample.target: (sample.question, sample.images[0].load()) for sample in samples.values()}


EXPECTED = {color: ("Which?", png(color)) for color in COLORS}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd
}  # fmt: skip


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_lines_and_tables(ending: str, folder: Path, capsys: Captured) -> None:
    pack = PACKERS[ending]
    table = b"file_name,Query,label\n" + b"".join(f"{color}.png,Which?,{color}\n".encode() for color in COLORS)
    Path("table.csv").write_bytes(table)
    for name, data in (("set.jsonl", lines()), ("list.json", b"[" + lines().strip().replace(b"\n", b",") + b"]"),
                       ("table.tsv", table)):  # fmt: skip
        Path(name + ending).write_bytes(pack(data))
        assert learned(name + ending) == EXPECTED, name
    assert learned("table.csv") == EXPECTED
    Path("hidden.jsonl").write_bytes(pack(lines()))  # told by its bytes
    assert learned("hidden.jsonl") == EXPECTED
    whole = pack(lines())
    for damage in (whole[: len(whole) // 2], whole[:-6] + b"xxxxxx" if ending != ".zst" else whole[:12]):
        Path("cut.jsonl" + ending).write_bytes(damage)
        assert main(["data", "check", "cut.jsonl" + ending, "--output_dir", "c"]) == 2
        told = capsys.readouterr().err
        assert "cut.jsonl" + ending in told and "damaged or cut off" in told and "Traceback" not in told


def test_a_bomb_is_told_before_the_memory_is_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(compressed, "FREE_BYTES", 1024**2)
    for ending, pack in PACKERS.items():
        Path("bomb.jsonl" + ending).write_bytes(pack(b" " * 20 * 1024**2))
        assert main(["data", "check", "bomb.jsonl" + ending, "--output_dir", "c"]) == 2
        assert "decompression bomb" in capsys.readouterr().err


def test_what_is_packed_otherwise_is_named_with_the_line_that_unpacks_it(folder: Path, capsys: Captured) -> None:
    for name, tool in (("x.zip", "unzip"), ("x.jsonl.zip", "unzip"), ("x.tar.gz", "gunzip"), ("x.tgz", "gunzip"),
                       ("x.parquet.zst", "unzstd")):  # fmt: skip
        Path(name).write_bytes(b"PK\x03\x04" if name.endswith("zip") else b"")
        assert main(["data", "check", name, "--output_dir", "c"]) == 2
        assert f"unpack it: {tool}" in capsys.readouterr().err, name
    Path("twice").mkdir()
    Path("twice/train.jsonl").write_bytes(lines())
    Path("twice/train.jsonl.gz").write_bytes(gzip.compress(lines()))
    assert main(["data", "check", "twice", "--output_dir", "c"]) == 2
    assert "one file twice" in capsys.readouterr().err


def features() -> datasets.Features:
    text = datasets.Value("string")
    return datasets.Features({"image": datasets.Image(), "question": text, "answer": text})


def table(colors: tuple[str, ...] = COLORS) -> datasets.Dataset:
    rows = {"image": [f"{c}.png" for c in colors], "question": ["Which?"] * len(colors), "answer": list(colors)}
    return datasets.Dataset.from_dict(rows, features=features())


def test_a_folder_of_save_to_disk(folder: Path, capsys: Captured) -> None:
    table().save_to_disk("saved", num_shards=2)
    assert learned("saved") == learned("saved/state.json") == EXPECTED
    parts = datasets.DatasetDict(train=table(COLORS[:3]), validation=table(COLORS[3:5]), testmini=table(COLORS[5:]))
    parts.save_to_disk("parts")
    (spec,) = parse_datasets("parts")
    for split, colors in (("train", COLORS[:3]), ("validation", COLORS[3:5])):
        assert [sample.target for sample in load_split(spec, split).samples] == list(colors)
    assert "splits that are not used: testmini" in capsys.readouterr().err
    assert learned("parts/train") == {color: EXPECTED[color] for color in COLORS[:3]}
    (arrow,) = Path("parts/train").glob("*.arrow")
    assert learned(str(arrow)) == {color: EXPECTED[color] for color in COLORS[:3]}
    assert main(["data", "import", "saved", "--output", "out"]) == 0
    assert learned("out") == EXPECTED
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert main(["data", "check", "parts", "--output_dir", "c"]) == 2
    assert line_with(capsys.readouterr().err, arrow.name, "cannot be read as an Arrow file")
    Path("saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))
    assert main(["data", "check", "saved", "--output_dir", "c"]) == 2
    assert "has no file" in capsys.readouterr().err


def test_classes_are_their_names_and_images_in_lists_are_found(folder: Path) -> None:
    named = features() | {"answer": datasets.ClassLabel(names=list(COLORS))}
    rows = {"image": [f"{c}.png" for c in COLORS], "question": ["Which?"] * 6, "answer": [*range(6)]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(named))
    made.save_to_disk("saved")
    made.to_parquet("set.parquet")
    assert learned("saved") == learned("set.parquet") == learned(dataset_argument(made, folder / "rows")) == EXPECTED
    cells = [[png(color), png("white")] for color in COLORS] + [None, []]
    asked = {"question": ["Which?"] * 8, "answer": [*COLORS, "none", "empty"]}
    for kind in (pa.list_(pa.binary()), pa.list_(pa.binary(), 2), pa.large_list(pa.large_binary())):
        images = cells[:7] if pa.types.is_fixed_size_list(kind) else cells
        made = pa.table({"images": pa.array(images, kind)} | {key: asked[key][: len(images)] for key in asked})
        pq.write_table(made.slice(1), "lists.parquet", row_group_size=3)
        pa.feather.write_feather(made.slice(1), "lists.arrow", compression="uncompressed")
        for name in ("lists.parquet", "lists.arrow"):
            samples = [s for split in SPLITS for s in load_split(parse_datasets(name)[0], split).samples]
            found = {s.target: [image.load() for image in s.images] for s in samples}
            wanted = {**dict(zip(COLORS, cells, strict=False)), "none": [], "empty": []}
            assert found == {answer: wanted[answer] for answer in asked["answer"][1 : len(images)]}, name


def write_table(kind: str, place: str, rows: list[dict[str, str]]) -> None:
    """The table of a folder of images."""
    if kind == "jsonl":
        Path(place, "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        text = "file_name,question,answer\n" + "".join(",".join(row.values()) + "\n" for row in rows)
        Path(place, "metadata.csv").write_text(text)
    else:
        pq.write_table(pa.Table.from_pylist(rows), Path(place, "metadata.parquet"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_of_images_with_its_table(kind: str, folder: Path, capsys: Captured) -> None:
    rows = [{"file_name": f"{color}.png", "question": "Which?", "answer": color} for color in COLORS]
    for place, part in ((f"set/{name}", rows[some]) for name, some in PARTS.items()):
        Path(place).mkdir(parents=True)
        for row in part:
            Path(row["file_name"]).rename(Path(place, row["file_name"]))
        write_table(kind, place, part)
    assert learned("set") == EXPECTED
    (spec,) = parse_datasets("set")
    assert [s.target for s in load_split(spec, "validation").samples] == list(COLORS[4:])
    both = [row | {"file_name": f"{part}/{row['file_name']}"} for part, some in PARTS.items() for row in rows[some]]
    write_table(kind, "set", both)  # one table for all
    Path("set/config.json").write_text("{}")
    for part in PARTS:
        Path("set", part, f"metadata.{kind}").unlink()
    assert [s.target for s in load_split(spec, "validation").samples] == list(COLORS[4:])
    assert main(["data", "import", "set", "--output", "out"]) == 0 and learned("out") == EXPECTED
    Path("alone").mkdir()
    Path("alone/a.png").write_bytes(png("red"))
    assert main(["data", "check", "alone", "--output_dir", "c"]) == 2
    assert "add metadata.csv" in capsys.readouterr().err


def asked(color: str, **more: Any) -> bytes:
    return json.dumps({"question": "Which?", "answer": color} | more).encode()


def test_shards_of_webdataset(folder: Path, capsys: Captured) -> None:
    Path("shards").mkdir()
    first = [(f"a/{c}.v1.png", png(c)) for c in COLORS[:2]] + [(f"a/{c}.json", asked(c)) for c in COLORS[:2]]
    talk = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "blue"}]
    second = [("x.PNG", png("blue")), ("x.json", json.dumps(talk).encode()), ("y.png", png("black")),
              ("y.question.txt", b"Which?\n"), ("y.answer.txt", b"black"),
              ("README", b"?"), ("y.pickle", b"?")]  # fmt: skip
    third = [("z.png", png("white")), ("z.json", asked("white", image="elsewhere.png"))]
    shard("shards/000.tar", first), shard("shards/001.tar", second), shard("shards/val-000.tar", third)
    expected = {color: EXPECTED[color] for color in COLORS[:5]}
    assert learned("shards") == learned("shards/*.tar") == learned("shards/{{000..001},val-000}.tar") == expected
    assert learned("shards/{000..001}.tar") == {color: EXPECTED[color] for color in COLORS[:4]}
    assert [s.target for s in load_split(parse_datasets("shards")[0], "validation").samples] == ["white"]
    assert main(["data", "import", "shards/*.tar", "--output", "out"]) == 0 and learned("out") == expected
    assert main(["data", "check", "shards/{000..003}.tar", "--output_dir", "c"]) == 2
    assert line_with(capsys.readouterr().err, "there is no 'shards/002.tar'", "1 others")
    odd = [("v.mp4", b"?"), ("v.json", asked("v")), ("j.png", png("red")), ("j.json", b"{"), ("d.png", png("red")),
           ("d.png", png("red")), ("t.png", png("red")), ("t.txt", b"a caption"), ("g.png", png("red")),
           ("g.json", asked("g")), ("h.png", png("blue")), ("h.json", asked("h"))]  # fmt: skip
    shard("odd.tar", odd)
    assert main(["data", "check", "odd.tar", "--split", "all", "--output_dir", "c", "--max_left_out", "1"]) == 0
    gone = [json.loads(line) for line in Path("c/left_out.jsonl").read_text().splitlines()]
    assert [item["reason"] for item in gone] == ["video", "broken JSON", "repeated member", "missing key"]
    assert VIDEO in gone[0]["detail"] and "odd.tar sample 4" in gone[3]["detail"]
    assert set(learned("odd.tar")) == {"g", "h"}


def to_link(info: TAR) -> None:
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


def test_archives_that_are_damaged_or_lead_out(folder: Path, capsys: Captured) -> None:
    sound = [(f"{c}{end}", data) for c in COLORS for end, data in ((".png", png(c)), (".json", asked(c)))]
    whole = Path(shard("sound.tar", sound)).read_bytes()
    header = whole.index(b"blue.png")
    bad = {
        "outside.tar": Path(shard("outside.tar", [*sound, ("../x.png", b"?"), ("../x.json", b"{}")])).read_bytes(),
        "absolute.tar": Path(shard("absolute.tar", [("/tmp/x.png", b"?")])).read_bytes(),
        "link.tar": Path(shard("link.tar", [("x.png", b"")], to_link)).read_bytes(),
        "within.tar": whole[: whole.index(b"gray.png") + 700],
        "between.tar": whole[: whole.index(b"gray.png")],  # the last member is missing, and nothing else
        "header.tar": whole[: header + 140] + b"junk" + whole[header + 144 :],
        "text.tar": b"no archive" * 100,
        "empty.tar": b"",
    }
    for name, data in bad.items():
        Path(name).write_bytes(data)
        assert main(["data", "check", name, "--output_dir", "c"]) == 2, name
        told = capsys.readouterr().err
        assert name in told and "Traceback" not in told and len(told.splitlines()) < 4, told
    assert not Path("../x.png").exists() and set(Path().iterdir()) <= {
        Path(name) for name in ("c", "sound.tar", *bad, *(f"{color}.png" for color in COLORS))
    }


def test_no_damage_raises_anything_else(folder: Path) -> None:
    rows = [{"image": png((n, 0, 0)), "question": f"{n}?", "answer": str(n)} for n in range(8)]
    made = pa.Table.from_pylist(rows)
    pq.write_table(made, "set.parquet", row_group_size=3)
    pa.feather.write_feather(made, "set.arrow", compression="uncompressed", chunksize=3)
    with pa.OSFile("stream.arrow", "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=3)
    shard(
        "set.tar",
        [(f"{n}{end}", data) for n in range(8) for end, data in ((".png", png("red")), (".json", asked("a")))],
    )
    draw, refused = random.Random(0), 0
    for name in ("set.parquet", "set.arrow", "stream.arrow", "set.tar"):
        whole = Path(name).read_bytes()
        for number in range(25):
            data = bytearray(whole[: draw.randrange(len(whole))] if number % 3 == 0 else whole)
            for _ in range(draw.choice((1, 5, 20)) if number % 3 else 0):
                data[draw.randrange(len(data))] = draw.randrange(256)
            Path(f"damaged_{number}_{name}").write_bytes(data)
            try:
                found = load_split(parse_datasets(f"damaged_{number}_{name}")[0], "train").samples
                assert all(sample.images[0].load() for sample in found if sample.images)
            except DataError:
                refused += 1
    assert refused > 50


def test_a_folder_of_several_kinds_says_which_is_read(folder: Path, capsys: Captured) -> None:
    Path("mixed").mkdir()
    Path("mixed/train.jsonl").write_bytes(lines("image").replace(b'"image": "', b'"image": "../'))
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), "mixed/more.parquet")
    assert learned("mixed") == EXPECTED
    assert "its .jsonl files are read, those of .parquet are not" in capsys.readouterr().err
    with pytest.raises(DataError, match="of no kind that is read"):
        parse_datasets(str(Path("red.png").resolve()))

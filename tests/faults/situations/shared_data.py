"""Data sets and runs that somebody else has made: links, absolute paths and `..`, and what is embedded from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.faults.situations.place import Place, Stage, files_with
from tests.pictures import png
from tests.wording import line_with

situation = Stage("shared data sets and runs")


def private(place: Place) -> Path:
    """A picture outside of every data folder."""
    path = place.folder / "private" / "scan.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png((1, 2, 3), (57, 41)))
    return path


def rows_with(image: str) -> list[dict[str, str]]:
    """Records of which one asks about another image."""
    rows = [{"image": f"{n}.png", "question": "Q?", "answer": "a"} for n in range(8)]
    return [*rows, {"image": image, "question": "What is it?", "answer": "b"}]


def _outside(place: Place, image: str) -> str:
    """Every command that would copy the picture says that it lies outside."""
    data = place.data(rows=rows_with(image))
    told = [
        place.run("data", "check", data, "--split", "all", "--output_dir", place.folder / "check"),
        place.run("data", "export", data, "--format", "jsonl", "--output", place.folder / "out"),
        place.run("data", "import", data / "data.jsonl", "--format", "jsonl", "--output", place.folder / "in"),
        place.run(*place.train(data, place.folder / "run")),
    ]
    for text in told[:-1]:
        line_with(text, "outside", "scan.png")
    line_with(told[-1], "note:", "outside", "1 questions")
    return line_with(told[1], "outside").replace(str(place.folder), "…")


@situation("an image by an absolute path outside of the data folder; check, export, import, train")
def absolute_path(place: Place) -> str:
    return _outside(place, str(private(place)))


@situation("an image by ../ outside of the data folder")
def parent_path(place: Place) -> str:
    return _outside(place, f"../private/{private(place).name}")


@situation("an image by file:// outside of the data folder")
def file_uri(place: Place) -> str:
    return _outside(place, f"file://{private(place)}")


@situation("an image that is a link to a picture outside of the data folder")
def link_to_a_picture(place: Place) -> str:
    target = private(place)
    place.data()
    (place.folder / "own" / "scan.png").symlink_to(target)
    return _outside(place, "scan.png")


@situation("a folder of images that is a link to one outside of the data folder")
def link_to_a_folder(place: Place) -> str:
    target = private(place)
    place.data()
    (place.folder / "own" / "images").symlink_to(target.parent)
    return _outside(place, "scan.png")


@situation("an image that names a text file of the system (/etc/passwd, by path and by link)")
def system_file(place: Place) -> str:
    data = place.data(rows=[*rows_with("/etc/passwd"), {"image": "link.png", "question": "Q?", "answer": "a"}])
    (data / "link.png").symlink_to("/etc/passwd")
    few = ("--max_left_out", "0.5")
    told = place.run("data", "check", data, "--output_dir", place.folder / "check", *few)
    told += place.run("data", "export", data, "--format", "jsonl", "--output", place.folder / "out", *few)
    found = [name for name in files_with(place.folder, "root:x:0") if name != "own/link.png"]
    assert "root:" not in told and not found, found
    return "left out by name; nothing of it is shown or copied"


@situation("links that go round in the data folder and in its images")
def links_in_a_circle(place: Place) -> str:
    data = place.data(
        rows=[{"image": f"{n}.png", "question": "Q?", "answer": "a"} for n in range(8)] + rows_with("loop.png")[-1:]
    )
    (data / "loop.png").symlink_to(data / "loop.png")
    (data / "round").symlink_to(data)
    told = place.run("data", "check", data, "--output_dir", place.folder / "check", "--max_left_out", "0.5")
    return line_with(told, "own").replace(str(place.folder), "…")


@situation("predictions of somebody else's run that name pictures by ../../ and through a link; report")
def pictures_of_a_foreign_run(place: Place) -> str:
    target, run = private(place), place.folder / "run"
    shutil.copytree(place.finished, run)
    folder = run / "evaluation"
    (folder / "images" / "link.webp").symlink_to(target)
    path = next(folder.glob("tuned/*/predictions.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["image"], rows[1]["image"] = "../../private/scan.png", "images/link.webp"
    for side in ("base", "tuned"):
        other = next(folder.glob(f"{side}/*/predictions.jsonl"))
        kept = [json.loads(line) for line in other.read_text().splitlines()]
        for old, new in zip(kept, rows, strict=True):
            old["image"] = new["image"]
        other.write_text("".join(json.dumps(row) + "\n" for row in kept))
    place.run("report", run, "--output", place.folder / "page.html")
    text = (place.folder / "page.html").read_text()
    assert "lead out of evaluation/ are not followed" in text
    return "neither is embedded; the page says that such names are not followed"


@situation("the output folder inside of the data folder; train twice, then data check")
def output_inside_the_data(place: Place) -> str:
    data = place.data()
    first = place.run(*place.train(data, data / "run", "--eval_benchmarks", data))
    again = place.run(*place.train(data, data / "run2"))
    check = place.run("data", "check", data, "--split", "all", "--output_dir", data / "check")
    counts = [line_with(text, "training set:") for text in (first, again)]
    assert counts[0] == counts[1], counts
    assert json.loads((data / "check" / "data.json").read_text())["samples"] == 16, check
    return f"the run's own files are not data: {counts[1]}"

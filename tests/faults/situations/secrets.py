"""Secrets of the environment and of the command line, and what of them stands in records."""

from __future__ import annotations

import json

from tests.faults.situations.place import Place, Stage, files_with
from tests.wording import line_with

situation = Stage("secrets in records")
SECRET = "s3cr3t-7f1c0de"
TOKENS = {
    name: f"{SECRET}-{name}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PASSWORD")
}


@situation(
    "HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, PASSWORD in the environment: train, eval, report, export, check"
)
def tokens_of_the_environment(place: Place) -> str:
    data, run = place.data(), place.folder / "run"
    told = place.run(*place.train(data, run, "--report_to", "tensorboard", "--eval_benchmarks", data), **TOKENS)
    told += place.evaluate(run, data, place.folder / "eval", **TOKENS)
    told += place.run("report", run, "--export", place.folder / "figures", **TOKENS)
    out, check = place.folder / "export", place.folder / "check"
    merge = ("--merge", "--dtype", "float32", "--questions", "1")
    told += place.run("export", "--adapter", run, "--output_dir", out, *merge, **TOKENS)
    told += place.run("data", "check", data, "--output_dir", check, **TOKENS)
    assert SECRET not in told and not files_with(place.folder, SECRET)
    count = sum(path.is_file() for path in place.folder.rglob("*"))
    return f"in none of {count} files, and not in what was printed"


@situation("a tracker's address with a password (MLFLOW_TRACKING_URI=http://user:password@host)")
def password_of_a_tracker(place: Place) -> str:
    more = {"MLFLOW_TRACKING_URI": f"http://anna:{SECRET}@127.0.0.1:9/", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    run = place.folder / "run"
    ended = place.start(*place.train(place.data(), run, "--report_to", "mlflow"), **more).wait(500)
    text = (place.folder / "log").read_text()
    assert ended in (0, 2) and "Traceback" not in text, text[-2000:]
    assert SECRET not in text and not files_with(run, SECRET), (files_with(run, SECRET), text[-3000:])
    return f"exit code {ended}; the password is in no file and not printed: {line_with(text, 'report_to mlflow')[:160]}"


@situation("an image URL with a password and a signed query in own data; data check, train, import")
def password_of_an_image_url(place: Place) -> str:
    rows = [{"image": f"{n}.png", "question": "Q?", "answer": "a"} for n in range(8)]
    rows.append(
        {"image": f"https://anna:{SECRET}@host/a.png?X-Amz-Signature={SECRET}", "question": "Q?", "answer": "a"}
    )
    data, check = place.data(rows=rows), place.folder / "check"
    told = place.run("data", "check", data, "--output_dir", check, "--max_left_out", "0.5")
    told += place.run(*place.train(data, place.folder / "run", "--max_left_out", "0.5"))
    told += place.run(
        "data",
        "import",
        data / "data.jsonl",
        "--format",
        "jsonl",
        "--output",
        place.folder / "in",
        "--max_left_out",
        "0.5",
    )
    assert SECRET not in told, line_with(told, SECRET)
    left = json.loads((check / "left_out.jsonl").read_text())["detail"]
    found = [name for name in files_with(place.folder, SECRET) if name != "own/data.jsonl"]
    assert not found, found
    return f"named without them: {left[:140]}"


@situation("a password in a URL on the command line (--dataset, --base_model, --adapter)")
def password_on_the_command_line(place: Place) -> str:
    url = f"https://anna:{SECRET}@host/set"
    told = place.run(*place.train(place.data(), place.folder / "run", "--dataset", url), code=2)
    told += place.run(*place.train(place.data(), place.folder / "run", "--base_model", url), code=2)
    told += place.evaluate(url, "demo", place.folder / "eval", code=2)
    assert SECRET not in files_with_text(place), files_with_text(place)
    assert SECRET not in told, line_with(told, SECRET)
    return line_with(told, "error:", "https://")[:160]


def files_with_text(place: Place) -> str:
    found = [name for name in files_with(place.folder, SECRET) if name != "log" and "own/" not in name]
    return f"{SECRET} in {found}" if found else ""

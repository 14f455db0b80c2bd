"""A training told to every tracker that is installed here: what they hold afterwards, read from their own files."""

from __future__ import annotations

import json
import os
import socketserver
import sqlite3
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import Warm
from vlm_sft.common import artifacts

INSTALLED = [name for name in ("tensorboard", "wandb", "mlflow", "trackio") if find_spec(name)]
METRIC = "demo_charts_relaxed_accuracy"
SHOWN = 8
# Names of variables with which a developer may have sent these trackers elsewhere.
FOREIGN = ("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_")


@dataclass
class Tracked:
    folder: Path
    output: str
    called: list[str] = field(default_factory=list)

    @property
    def results(self) -> dict[str, Any]:
        return artifacts.read_json(self.folder / artifacts.RESULTS)["benchmarks"]["demo_charts"]

    @property
    def recipe(self) -> dict[str, Any]:
        return artifacts.read_json(self.folder / artifacts.RECIPE)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Iterator[Tracked]:
    """One run in a home without logins, whose way to other machines is a proxy that notes every call."""
    place = tmp_path_factory.mktemp("tracked")
    called: list[str] = []

    class Proxy(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            called.append(self.rfile.readline().decode(errors="replace"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.server_address[1]}"
        proxies = {name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
        done = warm.run(
            "train",
            "--base_model",
            "pocket",
            "--dataset",
            "demo_charts",
            "--max_train",
            "32",
            "--max_eval",
            "20",
            "--eval_samples",
            "8",
            "--global_batch_size",
            "16",
            "--num_train_epochs",
            "1",
            "--eval_steps",
            "1",
            "--save_steps",
            "1",
            "--logging_steps",
            "1",
            "--metric_for_best_model",
            METRIC,
            "--report_to",
            ",".join(INSTALLED),
            "--output_dir",
            place / "run",
            "--cache_dir",
            place / "cache",
            more={"HOME": str(place / "home"), "NO_PROXY": "", "no_proxy": "", **proxies},
            without=[name for name in os.environ if name.startswith(FOREIGN)],
        )
        assert done.returncode == 0, done.stderr[-2000:]
        server.shutdown()
    yield Tracked(place / "run", done.stdout, called)


def test_nothing_is_sent_and_the_places_are_told(tracked: Tracked) -> None:
    assert tracked.called == []
    known = artifacts.read_json(tracked.folder / artifacts.TRACKERS)
    assert list(known["runs"]) == INSTALLED and known["name"].startswith("run-")
    assert all(str(tracked.folder) in run["place"] for run in known["runs"].values())
    assert f"TensorBoard: tensorboard --logdir {tracked.folder / 'runs'}" in tracked.output
    assert not (tracked.folder.parent / "home" / ".local" / "share" / "wandb").exists()
    run = artifacts.read_json(tracked.folder / artifacts.RUN)
    assert len(run["notes"]) == 1 and "2 optimizer steps" in run["notes"][0], "it says how few they are"
    assert run["bytes"]["logs"] > 100_000


def test_tensorboard(tracked: Tracked) -> None:
    (folder,) = {path.parent for path in tracked.folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars(f"eval/{METRIC}")] == [1, 2]
    for side in ("base", "tuned"):
        (score,) = events.Scalars(f"results/demo_charts/{side}")
        assert score.step == 2 and score.value == pytest.approx(tracked.results[side]["accuracy"])
    texts = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("recipe", "results", "predictions")
    }
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in texts["recipe"].splitlines()}
    assert rows["metric_for_best_model"] == METRIC and rows["global_batch_size"] == "16"
    assert set(tracked.recipe) <= set(rows)
    assert tracked.results["verdict"] in texts["results"] and "demo_charts (synthetic)" in texts["results"]
    assert len(texts["predictions"].splitlines()) == SHOWN + 2
    assert [events.Images(f"predictions/{number}")[0].width for number in range(1, SHOWN + 1)] == [480] * SHOWN


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: after 7 bytes blocks of 32 KiB, with checksum, length and kind of each piece."""
    from wandb.proto import wandb_internal_pb2

    data, place, held = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 0 < (left := -place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        held += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


@pytest.mark.skipif("wandb" not in INSTALLED, reason="the wandb extra is not installed")
def test_wandb_without_a_login_is_offline(tracked: Tracked) -> None:
    (run,) = (tracked.folder / "wandb").glob("offline-run-*")
    config, summary, steps, ended = {}, {}, {}, None
    for record in wandb_records(next(run.glob("*.wandb"))):
        for update in (*record.run.config.update, *record.config.update):
            config[update.key] = json.loads(update.value_json)
        for update in record.summary.update:
            summary["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        values = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in ("train/loss", f"eval/{METRIC}"):
            if name in values:
                steps.setdefault(name, []).append(values["train/global_step"])
        ended = record.exit.exit_code if record.WhichOneof("record_type") == "exit" else ended
    assert config["recipe"] == tracked.recipe and config["base_model"] == "pocket"
    assert steps == {"train/loss": [1, 2], f"eval/{METRIC}": [1, 2]} and ended == 0
    assert summary["results/demo_charts/tuned"] == tracked.results["tuned"]["accuracy"]
    media = run / "files" / "media"
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in (media / "table").glob("*.json")}
    assert tables["results"]["data"][0][-1] == tracked.results["verdict"]
    assert len(tables["predictions"]["data"]) == SHOWN
    pictures = list((media / "images").glob("pictures_*.png"))
    assert len(pictures) == SHOWN and {Image.open(path).width for path in pictures} == {480}
    assert f"wandb sync {run}" in tracked.output


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="the mlflow extra is not installed")
def test_mlflow_keeps_a_local_store(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient((tracked.folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("vlm-sft")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["base_model"] == "pocket"
    params = {key: value for key, value in run.data.params.items() if key.startswith("recipe.")}
    assert {key.removeprefix("recipe.") for key in params} == set(tracked.recipe)
    assert float(params["recipe.learning_rate"]) == tracked.recipe["learning_rate"]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, f"eval_{METRIC}")] == [1, 2]
    assert run.data.metrics["results/demo_charts/difference"] == pytest.approx(tracked.results["difference"])
    files = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((files / "recipe.json").read_text()) == tracked.recipe
    assert json.loads((files / "results_table.json").read_text())["data"][0][-1] == tracked.results["verdict"]
    shown = json.loads((files / "predictions.json").read_text())
    assert shown["columns"][1:5] == ["question", "reference", "base", "tuned"] and len(shown["data"]) == SHOWN
    assert len(list((files / "predictions").glob("*.png"))) == SHOWN


@pytest.mark.skipif("trackio" not in INSTALLED, reason="the trackio extra is not installed")
def test_trackio_keeps_a_local_database(tracked: Tracked) -> None:
    folder = tracked.folder / "trackio"
    with sqlite3.connect(folder / "vlm-sft.db") as store:
        (config,) = (json.loads(row[0]) for row in store.execute("select config from configs"))
        rows = [json.loads(row[0]) for row in store.execute("select metrics from metrics order by id")]
    assert {key: config[f"recipe.{key}"] for key in tracked.recipe} == tracked.recipe
    assert [row["train/global_step"] for row in rows if f"eval/{METRIC}" in row] == [1, 2]
    last = rows[-1]
    assert last["results/demo_charts/tuned"] == tracked.results["tuned"]["accuracy"]
    assert last["results"]["_value"][0]["verdict"] == tracked.results["verdict"]
    pictures = [folder / "media" / row["picture"]["file_path"] for row in last["predictions"]["_value"]]
    assert len(pictures) == SHOWN and all(Image.open(path).width > 0 for path in pictures)

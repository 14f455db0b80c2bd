"""Trackers without a training: absent packages, what is told, resumed runs, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults import training
from tests.report_runs import make_run
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import InterruptedRunError, RecipeError, RunError
from vlm_sft.report.predictions import OUTCOMES
from vlm_sft.trackers import check
from vlm_sft.trackers.card import COLOURS, LINE_PIXELS, draw_card, same_size
from vlm_sft.trackers.check import check_trackers
from vlm_sft.trackers.content import COLUMNS, SAMPLES, Outcome, recipe_markdown
from vlm_sft.trackers.session import SHOWN_IN, Trackers
from vlm_sft.train.run_folder import clear_run

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"base_model": "pocket", "dataset": "demo_charts"}
ABSENT = next(name for name in ("neptune", "clearml", "swanlab", "dvclive") if find_spec(name) is None)
mlflow_here = pytest.mark.skipif(find_spec("mlflow") is None, reason="the mlflow extra is not installed")
wandb_here = pytest.mark.skipif(find_spec("wandb") is None, reason="the wandb extra is not installed")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variable that sends trackers elsewhere, no login, and none that they set stays."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def recipe(*names: str, **keys: object) -> dict[str, object]:
    return {"learning_rate": 1e-4, "optim": "adamw_torch", "report_to": list(names), **keys}


# Absent packages


def test_a_missing_package_ends_the_command_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = ["--base_model", "pocket", "--dataset", "demo_charts"], ["--output_dir", str(tmp_path / "run")]
    assert main(["train", *data, *output, "--report_to", f"tensorboard,{ABSENT}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "--report_to" in told and f"pip install {ABSENT}" in told
    assert not (tmp_path / "run").exists()


def test_all_mistakes_come_together_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_spec", lambda module: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "true")
    with pytest.raises(RecipeError) as caught:
        check_trackers(("wandb", "mlflow", "trackio", "dagshub"))
    for name in check.EXTRAS:
        assert f"report_to {name}: the package {name} is not installed" in caught.value.what
        assert f"pip install 'vlm-sft[{name}]'" in caught.value.fix
    assert "DISABLE_MLFLOW_INTEGRATION=TRUE" in caught.value.what
    assert "report_to dagshub: MLFLOW_TRACKING_URI is not set" in caught.value.what


def test_a_folder_of_the_same_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ABSENT).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec(ABSENT) is not None
    with pytest.raises(RecipeError, match="is not installed"):
        check_trackers((ABSENT,))
    check_trackers(("none",))
    check_trackers(("tensorboard",))


def test_every_extra_is_in_pyproject_and_every_tracker_has_its_class() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(check.EXTRAS) <= set(extras)
    assert set(SHOWN_IN) == {"tensorboard", *check.EXTRAS}


# What is told


def test_the_table_and_the_scores_are_those_of_results_json(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path))
    assert outcome.scores["results/easy_vqa/base"] == 0.61 and outcome.scores["results/easy_vqa/tuned"] == 0.764
    assert outcome.scores["results/demo_charts/difference"] == pytest.approx(0.095) and len(outcome.scores) == 6
    assert outcome.rows[0] == (
        "easy_vqa",
        "relaxed accuracy",
        "1,000",
        "61.0 % [58.0, 64.0]",
        "76.4 % [73.4, 79.4]",
        "+15.4 [+13.4, +17.4]",
        "better",
    )
    assert outcome.rows[1][0] == "demo_charts (synthetic)"


def test_the_samples_are_a_mix_with_their_pictures(tmp_path: Path) -> None:
    shown = Outcome(make_run(tmp_path)).shown
    assert len(shown) == SAMPLES
    outcomes = [dict(zip(COLUMNS, one.values, strict=True))["outcome"] for one in shown]
    assert set(outcomes) == set(OUTCOMES[:4])
    assert all(one.picture is not None and max(one.picture.size) == 480 for one in shown)
    values = dict(zip(COLUMNS, shown[0].values, strict=True))
    number = values["question"].removeprefix("What is the value of bar ").removesuffix("?")
    assert values["reference"] == number == values["tuned"] and values["base"] == f"about {int(number) + 7}"


def test_damaged_results_give_an_empty_outcome(tmp_path: Path) -> None:
    (tmp_path / artifacts.RESULTS).write_text("{", encoding="utf-8")
    outcome = Outcome(tmp_path)
    assert outcome.benchmarks == () and outcome.scores == {} and outcome.shown == []


def test_a_recipe_is_a_table_of_json_values() -> None:
    lines = recipe_markdown({"train": ["language"], "optim": "adamw", "max_pixels": None}).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:]] == [
        ["train", '["language"]'],
        ["optim", "adamw"],
        ["max_pixels", "null"],
    ]


def test_a_card_grows_with_its_text_and_shows_right_and_wrong() -> None:
    picture = Image.new("RGB", (60, 40), "blue")
    short = draw_card(picture, [("base", "12", "wrong"), ("tuned", "13", "right")])
    assert short.width == 480 and short.height == 8 * 40 + 10 + 2 * LINE_PIXELS + 10
    colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in short.getcolors(1_000_000)}
    assert {COLOURS["wrong"], COLOURS["right"], "#0000ff"} <= colours
    words = draw_card(None, [("question", "word " * 40, "")])
    letters = draw_card(None, [("question", "x" * 200, "")])
    assert words.height > 4 * LINE_PIXELS and letters.height > 4 * LINE_PIXELS
    assert np.asarray(letters)[:, -8:].min() == 255, "the text stays inside the margin"
    assert {card.size for card in same_size([short, words])} == {short.size}
    assert same_size([]) == []


# Sessions


def session(folder: Path, *names: str, step: int = 0, notes: list[str] | None = None, **keys: object) -> Trackers:
    return Trackers(folder, recipe(*names, **keys), FACTS, step, (notes if notes is not None else []).append)


def test_a_resumed_run_goes_on_in_the_same_events(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with session(folder, "tensorboard") as trackers:
        trackers.begin()
        writer = trackers.callbacks()[0].tb_writer
        for step in range(1, 7):
            writer.add_scalar("train/loss", step, step)
    with session(folder, "tensorboard", step=4) as trackers:
        trackers.begin()
        trackers.callbacks()[0].tb_writer.add_scalar("train/loss", 50, 5)
        trackers.conclude(step=5)
    (events,) = {path.parent for path in folder.rglob("events.out.*")}
    loss = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in loss] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    with session(folder, "tensorboard") as trackers:
        trackers.begin()
        assert trackers.callbacks()[0].tb_writer.purge_step is None, "a run that starts over is a new one"


def test_nothing_is_opened_without_trackers_or_on_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(tmp_path, "none") as trackers:
        trackers.begin()
    monkeypatch.setenv("RANK", "1")
    with session(tmp_path, "tensorboard") as trackers:
        trackers.begin()
        assert trackers.callbacks() == []
        trackers.conclude(step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_be_opened_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "events"))
    with pytest.raises(RunError) as caught, session(tmp_path, "tensorboard") as trackers:
        trackers.begin()
    assert "report_to tensorboard: " in caught.value.what and "take it out of --report_to" in caught.value.fix


@mlflow_here
def test_mlflow_goes_on_unless_the_recipe_changed(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = make_run(tmp_path)
    runs = []
    for step, rate in ((0, 1e-4), (3, 1e-4), (3, 2e-4)):
        with session(folder, "mlflow", step=step, learning_rate=rate) as trackers:
            trackers.begin()
            trackers.conclude(step=5)
        runs.append(artifacts.read_json(folder / artifacts.TRACKERS)["runs"]["mlflow"]["run"])
    assert runs[0] == runs[1] != runs[2]
    client = MlflowClient((folder / "mlruns").as_uri())
    first, last = client.get_run(runs[0]), client.get_run(runs[2])
    assert first.data.params["recipe.learning_rate"] == "0.0001" and first.info.status == "FINISHED"
    assert last.data.params["recipe.learning_rate"] == "0.0002" and last.data.tags["resumed_from"] == runs[0]
    tables = [item.path for item in client.list_artifacts(runs[0]) if item.path.startswith("results_table")]
    assert len(tables) == 2, "the tables of both evaluations"
    for path in tables:
        text = Path(first.info.artifact_uri.removeprefix("file://"), path).read_text()
        assert len(json.loads(text)["data"]) == 2


@mlflow_here
@pytest.mark.parametrize(("error", "status"), [(InterruptedRunError("stopped"), "KILLED"), (ValueError(), "FAILED")])
def test_mlflow_is_told_how_a_run_ended(tmp_path: Path, error: Exception, status: str) -> None:
    from mlflow import MlflowClient

    with pytest.raises(type(error)), session(tmp_path, "mlflow") as trackers:
        trackers.begin()
        raise error
    run = artifacts.read_json(tmp_path / artifacts.TRACKERS)["runs"]["mlflow"]["run"]
    assert MlflowClient((tmp_path / "mlruns").as_uri()).get_run(run).info.status == status


@mlflow_here
def test_a_tracker_that_is_lost_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    with session(make_run(tmp_path), "tensorboard", "mlflow", notes=notes) as trackers:
        trackers.begin()
        shutil.rmtree(tmp_path / "mlruns")
        trackers.conclude(step=5)
    assert any(note.startswith("report_to mlflow: ") for note in notes)
    assert "the run's files have everything" in capsys.readouterr().err
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    assert "results/easy_vqa/tuned" in EventAccumulator(str(events)).Reload().Tags()["scalars"]


@wandb_here
def test_wandb_goes_on_under_the_same_id_and_honours_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    for step in (0, 3):
        with session(folder, "wandb", step=step) as trackers:
            trackers.begin()
            trackers.conclude(step=5)
    known = artifacts.read_json(folder / artifacts.TRACKERS)["runs"]["wandb"]["run"]
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {known}
    assert sum(len(list(run.rglob("pictures_*.png"))) for run in runs) >= SAMPLES
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with session(tmp_path / "other", "wandb") as trackers:
        trackers.begin()
    assert not (tmp_path / "other" / "wandb").exists()


def test_starting_over_removes_what_trackers_wrote(tmp_path: Path) -> None:
    for name in artifacts.TRACKER_FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x", encoding="utf-8")
    (tmp_path / artifacts.TRACKERS).write_text("{}", encoding="utf-8")
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_tracker_of_transformers_alone_follows_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    if not hasattr(integrations, "KubeflowCallback"):
        pytest.skip("this transformers does not know Kubeflow")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1:9")
    seen: list[str] = []
    for event in ("on_init_end", "on_train_begin", "on_log", "on_train_end"):
        monkeypatch.setattr(
            integrations.KubeflowCallback, event, lambda *_, event=event, **__: seen.append(event), raising=False
        )
    data = training.prepared(training.samples())
    training.trainer(data, tmp_path, max_steps=1, report_to=("kubeflow",)).run()
    assert seen == ["on_init_end", "on_train_begin", "on_log", "on_log", "on_train_end"]

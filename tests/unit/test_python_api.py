"""`import vlm_sft` in a script: data in memory, keywords, callbacks, errors, and what is left of the process."""

from __future__ import annotations

import base64
import doctest
import inspect
import os
import random
import re
import signal
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

import vlm_sft as vs
from tests.documents import ROOT
from vlm_sft.api.rows import dataset_argument
from vlm_sft.cli.main import main
from vlm_sft.common.console import in_notebook, progress
from vlm_sft.common.errors import DataError, EvaluationError, InterruptedRunError, RecipeError, RunError
from vlm_sft.data.sources.registry import load_split
from vlm_sft.data.sources.spec import parse_datasets

MEANING = {"red": "stop", "orange": "wait", "green": "go"}
QUESTION = "What does the light say?"
SHORT: dict[str, Any] = {
    "base_model": "pocket",
    "max_steps": 3,
    "global_batch_size": 6,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "report_to": "none",
    "feature_cache": "off",
}


def lamps(count: int = 24) -> list[dict[str, Any]]:
    """Pictures of one colour, with what it means."""
    names = list(MEANING)
    return [
        {"image": Image.new("RGB", (32 + number, 32), names[number % 3]), "question": QUESTION, "answer": MEANING[name]}
        for number in range(count)
        for name in [names[number % 3]]
    ]


class Events(TrainerCallback):
    """Notes what it is told; ends the training after some steps."""

    def __init__(self, last: int = 100) -> None:
        self.last, self.told, self.losses = last, [], []  # type: ignore[var-annotated]

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append("init")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        assert isinstance(model, PeftModel) and args.max_steps == 3
        self.told.append("begin")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append(state.global_step)
        control.should_training_stop = state.global_step >= self.last

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told.append("end")


def length(prediction: str, answers: list[str]) -> int:
    """A metric of a user's."""
    return len(prediction)


def state_of_process() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "filters": list(warnings.filters),
        "verbosity": logging.get_verbosity(),
        "bars": logging.is_progress_bar_enabled(),
        "threads": torch.get_num_threads(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),  # type: ignore[index]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in which two trainings run, one after the other, in this process."""
    place = tmp_path_factory.mktemp("api")
    before = Path.cwd(), os.environ.get("VLM_SFT_CACHE")
    os.chdir(place)
    os.environ["VLM_SFT_CACHE"] = str(place / "cache")
    yield place
    os.chdir(before[0])
    if before[1] is None:
        del os.environ["VLM_SFT_CACHE"]


@pytest.fixture(scope="module")
def told() -> Events:
    return Events()


@pytest.fixture(scope="module")
def run(folder: Path, told: Events) -> vs.Run:
    before = state_of_process()
    made = vs.finetune(lamps(), callbacks=[told], metrics=[length], **SHORT)
    after = state_of_process()
    assert [name for name in before if before[name] != after[name]] == []
    return made


def test_a_training_of_rows_in_memory(run: vs.Run, told: Events) -> None:
    assert run.folder == Path("outputs/run-1") and run.status == "finished"
    assert told.told == ["init", "begin", 1, 2, 3, "end"] and len(told.losses) == 3
    frame = run.results.to_pandas()
    assert list(frame.benchmark) == ["rows"] and frame.tuned_length[0] > 0
    assert 0 <= frame.tuned_low[0] <= frame.tuned[0] <= frame.tuned_high[0] <= 1
    assert run.results["rows"]["tuned"]["secondary"]["length"] == frame.tuned_length[0]
    assert "rows" in repr(run.results) and "<table>" in run.results._repr_html_()
    assert run.recipe["learning_rate"] == 2e-3


def test_the_curve_and_the_report_show_themselves(run: vs.Run) -> None:
    curve = run.loss_curve()
    frame = curve.to_pandas()
    assert list(frame.step[frame.loss.notna()]) == [1, 2, 3]
    assert curve._repr_html_().count("<svg") == 1
    page = run.report("own.html")
    assert Path(page).stat().st_size > 10_000 and page._repr_html_().startswith("<iframe")


def test_a_run_is_asked_compared_and_loaded(run: vs.Run) -> None:
    red, green = Image.new("RGB", (40, 40), "red"), np.full((40, 40, 3), (0, 128, 0), dtype=np.uint8)
    answers = run.ask([red, green], [QUESTION, QUESTION])
    assert len(answers) == 2 and all(row["base"] and row["tuned"] is not None for row in answers)
    assert list(run.ask(red, ["a?", "b?"]).to_pandas().question) == ["a?", "b?"]
    assert len(run.ask([[red, green], red], ["Is <image> like <image>?", QUESTION])) == 2
    with pytest.raises(DataError, match="2 images and 1 questions"):
        run.ask([red, red], ["a?"])
    (row,) = run.compare()
    assert row["benchmark"] == "rows" and row["n"] == run.results["rows"]["n"]
    model, processor = run.load()
    assert isinstance(model, PeftModel) and isinstance(model.get_base_model(), PreTrainedModel)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=[red], text=[text], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_second_training_equals_the_first(run: vs.Run, folder: Path, told: Events) -> None:
    early = Events(last=2)
    second = vs.finetune(lamps(), callbacks=[early], eval_benchmarks="none", **SHORT)
    assert second.folder == Path("outputs/run-2") and early.told == ["init", "begin", 1, 2, "end"]
    assert early.losses[:2] == told.losses[:2]
    with pytest.raises(RunError, match="does not exist"):
        _ = second.results
    assert vs.open_run(second.folder).record["steps"] == 2
    with pytest.raises(RunError, match="holds another run"):
        vs.finetune(lamps(), output_dir=second.folder, **SHORT)


class CtrlC(TrainerCallback):
    """Interrupts the training in its second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_training_is_resumed(run: vs.Run, told: Events) -> None:
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT after step 2") as stopped:
        vs.finetune(lamps(), output_dir="stopped", callbacks=[CtrlC()], eval_benchmarks="none", **SHORT)
    assert 'output_dir="stopped", resume="auto"' in str(stopped.value)
    rest = Events()
    resumed = vs.finetune(
        lamps(), output_dir="stopped", callbacks=[rest], eval_benchmarks="none", resume="auto", **SHORT
    )
    assert rest.losses == told.losses[2:] and resumed.status == "finished"


def test_the_run_is_exported(run: vs.Run, folder: Path) -> None:
    assert (run.export("merged", merge=True, questions=1) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"learning_rat": 1e-3}, RecipeError, ["unknown key", "did you mean learning_rate?"]),
        ({"learning_rate": -1, "lora_r": "many"}, RecipeError, ["2 mistakes", "--lora_r"]),
        ({"recipe": "bset"}, RecipeError, ["did you mean", "best"]),
        ({"on_save_error": "stopp"}, RunError, ["continue, stop", "did you mean stop"]),
        ({"max_bad_steps": 1.5}, RunError, ["--max_bad_steps", "whole number"]),
        ({"packing": "maybe"}, RunError, ["--packing", "neither on nor off"]),
        ({"metrics": [length, length]}, EvaluationError, ["same name"]),
    ],
)
def test_mistakes_are_errors_with_the_texts_of_the_command_line(
    keywords: dict[str, Any], error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(error) as told:
        vs.finetune(lamps(3), output_dir=tmp_path / "run", **{"base_model": "pocket", **keywords})
    assert all(word in str(told.value) for word in words), told.value
    assert not (tmp_path / "run").exists()


def test_a_mistake_reads_as_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError) as told:
        vs.finetune("demo_charts", output_dir=tmp_path / "run", base_model="pocket", warmup_ratio="2")
    command = f"train --base_model pocket --dataset demo_charts --output_dir {tmp_path / 'run'} --warmup_ratio 2"
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"error: {told.value}\n"


def samples(data: Any, folder: Path, split: str = "train") -> list[tuple[str, str, tuple[str, ...]]]:
    (spec,) = parse_datasets(dataset_argument(data, folder))
    loaded = load_split(spec, split)
    assert not loaded.left_out
    return sorted((one.question, one.target, tuple(image.key for image in one.images)) for one in loaded.samples)


def test_every_shape_of_data_is_the_same_data(tmp_path: Path) -> None:
    rows = lamps(12)
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / f"{number}.png")
    paths = [{**row, "image": str(tmp_path / f"{number}.png")} for number, row in enumerate(rows)]
    encoded = [{**row, "image": Path(row["image"]).read_bytes()} for row in paths]
    stored = datasets.Dataset.from_list(paths).cast_column("image", datasets.Image())
    splits = datasets.DatasetDict({"train": stored, "validation": stored, "test": stored})
    expected = samples({"train": paths, "val": paths, "test": paths}, tmp_path / "a")
    assert len(expected) == 12
    texts = [{**row, "image": base64.b64encode(row["image"]).decode()} for row in encoded]
    frames = (pandas.DataFrame(paths), polars.DataFrame(paths), polars.LazyFrame(encoded))
    for number, data in enumerate((encoded, texts, stored, *frames, iter(paths))):
        assert samples({"train": data, "dev": paths, "test": paths}, tmp_path / f"b{number}") == expected
    assert samples(splits, tmp_path / "c", "test") == expected
    chat = [{"images": [row["image"]], "messages": conversation(row["answer"])} for row in rows]
    assert len(samples({"train": chat, "test": chat}, tmp_path / "d", "test")) == 12


def test_paths_are_those_of_images_and_relative_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"")
    Image.new("RGB", (40, 40), "red").save("b.png")
    rows = [{"image": name, "question": "Which file?", "answer": "a.png"} for name in ("b.png", "c.png")]
    (spec,) = parse_datasets(dataset_argument({"train": rows, "test": rows}, tmp_path / "rows"))
    loaded = load_split(spec, "train")
    assert [sample.target for sample in loaded.samples] == ["a.png"]
    assert [f"there is no file {tmp_path / 'c.png'}" in one.detail for one in loaded.left_out] == [True]


def conversation(answer: str) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    return [asked, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("data", [[], 3, None, [1, 2], {"trane": []}, {"question": "?"}, {"train": []}])
def test_other_data_is_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pass a list of dicts|its keys are"):
        dataset_argument(data, tmp_path / "rows")


def test_a_plan_is_the_forecast_of_the_training(run: vs.Run) -> None:
    before = state_of_process()
    forecast = vs.plan(lamps(), **SHORT)
    assert [name for name, value in state_of_process().items() if before[name] != value] == []
    assert forecast.to_dict()["schedule"]["steps"] == 3
    assert forecast.to_dict()["questions"] == run.record["questions_seen"] + 2  # 20 are trained on, 18 in 3 steps
    for row in forecast:
        assert row["low"] <= row["value"] <= row["high"] and row["value"] > 0
    assert "time" in repr(forecast) and "<table>" in forecast._repr_html_()
    assert forecast.to_pandas().unit.tolist() == ["s", "B", "B"]
    for keywords in ({}, {"data": lamps(3), "questions": 5}, {"data": lamps(3), "image_size": "8x8"}):
        with pytest.raises(RunError, match="questions"):
            vs.plan(**keywords)


def test_an_evaluation_scores_as_the_training_did(run: vs.Run) -> None:
    rows = run.folder / "rows"
    scores = vs.evaluate_model(adapter=run, benchmark=rows, metrics={"letters": length})
    entry = run.results["rows"]["tuned"]
    (row,) = scores
    assert row["accuracy"] == entry["accuracy"] and row["letters"] == entry["secondary"]["length"]
    base = vs.evaluate_model("pocket", benchmark={"test": lamps(6)}, limit=4, output_dir="evaluated")
    assert base["rows"]["n"] == 4 and "rows" in base._repr_html_()
    with pytest.raises(RunError, match="did you mean limit"):
        vs.evaluate_model("pocket", benchmark="demo_charts", limits=4)
    with pytest.raises(RunError, match="which model answers"):
        vs.evaluate_model(benchmark="demo_charts")


def test_answers_are_scored_by_the_rule_of_a_benchmark(tmp_path: Path) -> None:
    scores = vs.score("chartqa", ["12", "blue"], ["12.3", ["red"]], metrics=[length])
    assert scores["chartqa"]["accuracy"] == 0.5 and scores[0]["length"] == 3.0
    (tmp_path / "p.jsonl").write_text('{"id": 1, "prediction": "12", "answers": ["12.3"]}\n')
    assert vs.score("chartqa", tmp_path / "p.jsonl")[0]["accuracy"] == 1.0
    with pytest.raises(EvaluationError, match="2 predictions and 1 answers"):
        vs.score("chartqa", ["1", "2"], ["1"])
    with pytest.raises(EvaluationError, match="did you mean 'chartqa'"):
        vs.score("chartQA", ["1"], ["1"])
    with pytest.raises(EvaluationError, match="the metric 'broken' gave None"):
        vs.score("chartqa", ["1"], ["1"], metrics={"broken": lambda prediction, answers: None})  # type: ignore[dict-item]


def test_runs_are_compared(run: vs.Run) -> None:
    (row,) = vs.compare([run])
    assert row["difference"] == run.results["rows"]["difference"]


def test_progress_in_a_notebook_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not in_notebook()
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={"IPKernelApp": {}}))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert in_notebook()
    with progress(2, "reading", "images") as bar:
        bar.advance(2)
    assert "reading: 100%" in capsys.readouterr().err


def test_the_import_loads_no_library() -> None:
    code = (
        "import sys, vlm_sft\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'datasets', 'peft'} & loaded\n"
        "assert not heavy, heavy\nassert set(vlm_sft.__all__) <= set(dir(vlm_sft))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_holds_the_whole_api() -> None:
    text = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    section = text.split("## What `import vlm_sft` offers")[1].split("\n## ")[0]
    named = re.findall(r"^::: vlm_sft\.([\w.]+)$", section, re.MULTILINE)
    assert sorted(named) == sorted(f"{vs._PLACES[name]}.{name}" for name in vs.__all__)


@pytest.mark.parametrize("name", vs.__all__)
def test_docstrings_describe_and_their_examples_run(name: str, folder: Path) -> None:
    thing = getattr(vs, name)
    assert inspect.getdoc(thing) and typing.get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    examples = doctest.DocTestFinder(recurse=False).find(thing, name, module=False)
    for example in examples:
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(example, out=lambda _: None).failed == 0, example.name

"""Which checkpoint a training keeps: by the task metric, within the guard, with a score that can be measured again.

Real runs of a tiny random model on data made for the purpose. Some "right answers" are what the untrained model says,
so that any training forgets them.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import COLOURS, png
from tests.processes import MAIN, Warm
from tests.tiny_models import save
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.data.sources.splits import SPLITS

# Said in every command: the answers here are no sentences, and what a model says by itself is cut.
ASKED = ("--max_new_tokens", "4", "--prompt_template", "{question}")
LAST = 12  # steps of a training


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and data whose validation answers are half the model's own, half never right."""
    folder = tmp_path_factory.mktemp("best")
    save("qwen2_5_vl", folder / "model")
    for index, colour in enumerate(COLOURS):
        (folder / f"{index}.png").write_bytes(png(colour, (56 + 14 * (index % 3), 70)))
    write(folder / "asked.jsonl", [question(index, f"Say {index}.", "?") for index in range(len(COLOURS))])
    for split in SPLITS:
        evaluate(folder, f"asked_{split}", "--benchmark", str(folder / "asked.jsonl"), "--split", split)
    said = {
        row["question"]: row["prediction"]
        for split in SPLITS
        for row in lines(folder / f"asked_{split}" / "asked" / "predictions.jsonl")
    }
    assert len(said) == len(COLOURS)
    assert all(said.values())
    own = [question(index, f"Say {index}.", said[f"Say {index}."]) for index in range(len(COLOURS))]
    (folder / "own").mkdir()
    # The loss falls while the frame of the answer is learned, which is never right to the last digit; meanwhile the
    # model forgets what it said by itself.
    learned = [question(index, f"Number {index}?", f"the number is {index}{index}") for index in range(len(COLOURS))]
    unseen = [question(index, f"Number {index}?", f"the number is {index}!") for index in range(len(COLOURS))]
    write(folder / "own" / "train.jsonl", [in_data(row) for row in learned])
    write(folder / "own" / "validation.jsonl", [in_data(row) for row in own[:3] + unseen])
    (folder / "remember").mkdir()
    write(folder / "remember" / "validation.jsonl", [in_data(row) for row in own])
    return folder


def question(index: int, text: str, answer: str) -> dict[str, str]:
    return {"image": f"{index}.png", "question": text, "answer": answer}


def in_data(row: dict[str, str]) -> dict[str, str]:
    return row | {"image": f"../{row['image']}"}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(folder: Path, name: str, *arguments: str) -> None:
    base = ["eval", "--base_model", str(folder / "model"), "--output_dir", str(folder / name)]
    assert main([*base, *ASKED, *arguments]) == 0


def train(folder: Path, name: str, *arguments: str) -> tuple[int, Path]:
    """Train for a few steps; the rate of the first is so low that its checkpoint answers about like the base."""
    out = folder / name
    return main(command(folder, out, *arguments)), out


def command(folder: Path, out: Path, *arguments: str) -> list[str]:
    return [
        "train",
        "--base_model",
        str(folder / "model"),
        "--dataset",
        str(folder / "own"),
        "--output_dir",
        str(out),
        "--max_steps",
        str(LAST),
        "--warmup_steps",
        str(LAST // 2),
        "--warmup_ratio",
        "0",
        "--learning_rate",
        "0.01",
        "--lora_dropout",
        "0",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
        "--global_batch_size",
        "8",
        "--load_best_model_at_end",
        "true",
        "--report_to",
        "none",
        "--eval_benchmarks",
        "none",
        *ASKED,
        *arguments,
    ]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in lines(run / "metrics.jsonl") if "eval_loss" in row}


@pytest.fixture(scope="module")
def by_metric(place: Path) -> Path:
    code, run = train(place, "by_metric", "--metric_for_best_model", "exact_match", "--eval_samples", "11")
    assert code == 0
    return run


def test_loss_and_task_metric_choose_different_checkpoints(place: Path, by_metric: Path) -> None:
    code, by_loss = train(place, "by_loss", "--eval_samples", "11")
    assert code == 0
    seen = evaluations(by_metric)
    assert seen[1]["eval_exact_match"] == pytest.approx(3 / 11)
    assert seen[LAST]["eval_exact_match"] < 3 / 11
    assert seen[LAST]["eval_loss"] < seen[1]["eval_loss"]
    best = [json.loads((run / "run.json").read_text())["best"] for run in (by_metric, by_loss)]
    assert (best[0]["step"], best[0]["metric"], best[0]["value"]) == (1, "exact_match", seen[1]["eval_exact_match"])
    assert best[1]["step"] > 1
    assert best[1]["metric"] == "eval_loss"
    for run, step in ((by_metric, best[0]["step"]), (by_loss, best[1]["step"])):
        kept = (run / "adapter_model.safetensors").read_bytes()
        assert kept == (run / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, LAST])
def test_a_recorded_score_is_measured_again_exactly(place: Path, by_metric: Path, step: int) -> None:
    again = f"again_{step}"
    evaluate(
        place,
        again,
        "--adapter",
        str(by_metric / f"checkpoint-{step}"),
        "--benchmark",
        str(place / "own"),
        "--split",
        "validation",
        "--limit",
        "11",
        "--tokens_per_pack",
        "200",
    )
    assert lines(place / again / "own" / "predictions.jsonl") == lines(
        by_metric / "validation" / f"step-{step}" / "own" / "predictions.jsonl"
    )
    result = json.loads((place / again / "own" / "results.json").read_text())
    assert result["accuracy"] == evaluations(by_metric)[step]["eval_exact_match"]


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    "parallel",
    [
        "ddp",
        pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3", marks=needs_deepspeed),
        pytest.param("fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_measure_the_same_and_choose_the_same(
    place: Path, by_metric: Path, warm: Warm, parallel: str
) -> None:
    out, log = place / parallel, place / f"{parallel}.log"
    stage = {"ddp": [], "fsdp": ["--fsdp"]}.get(parallel, ["--deepspeed", parallel])
    options = command(place, out, "--metric_for_best_model", "exact_match", "--eval_samples", "11", *stage)
    assert warm.start_both(options, log, script=MAIN).wait(280) == 0, log.read_text()[-4000:]
    facts = [json.loads((run / "run.json").read_text()) for run in (out, by_metric)]
    assert (facts[0]["parallel"], facts[0]["world_size"]) == (parallel, 2)
    for step in range(1, LAST + 1):
        rows = [lines(run / "validation" / f"step-{step}" / "own" / "predictions.jsonl") for run in (out, by_metric)]
        assert rows[0] == rows[1]
    assert facts[0]["best"] == facts[1]["best"]


def test_a_prompt_other_than_that_of_the_training_is_refused(
    place: Path, by_metric: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "eval",
        "--base_model",
        str(place / "model"),
        "--adapter",
        str(by_metric),
        "--benchmark",
        str(place / "remember"),
        "--split",
        "validation",
        "--output_dir",
        str(place / "other"),
        "--prompt_template",
        r"{question}\nBriefly.",
        "--max_pixels",
        "9000",
    ]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert r"template '{question}\nBriefly.'" in told and "max_pixels 9000" in told
    assert main([*arguments, "--allow_prompt_mismatch"]) == 0
    assert line_with(capsys.readouterr().err, "warning: ", "not that of the training")


def test_a_checkpoint_that_forgets_is_not_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train(place, "guarded", "--guard", f"{place / 'remember'}:15")
    assert code == 0
    told = capsys.readouterr().out
    assert "cannot be the best checkpoint" in told
    record = json.loads((run / "guard.json").read_text())
    verdicts = {entry["step"]: entry for entry in record["evaluations"]}
    assert list(verdicts) == list(range(1, LAST + 1))
    assert verdicts[1]["guards"][0]["base"] == 1.0
    assert verdicts[1]["guards"][0]["score"] >= 1 - 1 / len(COLOURS), "the first step changes one answer at most"
    assert verdicts[1]["qualifies"]
    assert not verdicts[LAST]["qualifies"]
    losses = {step: row["eval_loss"] for step, row in evaluations(run).items()}
    assert min(losses, key=losses.get) != record["best_step"], "the loss alone would have chosen another one"
    assert verdicts[record["best_step"]]["qualifies"]
    assert "best" in told.split("changes on the guarded benchmarks")[1]


def test_exit_code_3_when_no_checkpoint_qualifies(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ("--warmup_steps", "0", "--learning_rate", "0.1")
    code, run = train(place, "forgot", "--guard", f"{place / 'remember'}:5", *fast)
    told = capsys.readouterr()
    assert code == 3
    assert "no checkpoint of" in told.err
    assert "satisfies --guard" in told.err
    record = json.loads((run / "guard.json").read_text())
    assert (record["qualified"], record["best_step"]) == (False, None)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    for name in ("adapter_model.safetensors", "report.html", f"checkpoint-{LAST}/adapter_model.safetensors"):
        assert (run / name).is_file(), name


def test_the_loss_of_one_data_set_chooses_the_checkpoint(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for split in SPLITS[:2]:  # what the model learns from the first set makes these answers ever less likely
        rows = [question(index, f"Number {index}?", f"{COLOURS[index]} it is") for index in range(len(COLOURS))]
        write(other / f"{split}.jsonl", [row | {"image": str(place / row["image"])} for row in rows])
    both = f"{place / 'own'}:9,{other}:0.05"
    flags = ("--dataset", both, "--metric_for_best_model", "eval_loss_other", "--early_stopping_patience", "2")
    code, run = train(place, "by_set", *flags, "--guard", f"{place / 'remember'}:100", "--eval_samples", "3")
    assert code == 0
    seen = evaluations(run)
    best = min(seen, key=lambda step: seen[step]["eval_loss_other"])
    record = json.loads((run / "run.json").read_text())
    assert record["best"] == {"step": best, "metric": "eval_loss_other", "value": seen[best]["eval_loss_other"]}
    assert max(seen) == best + 2 < LAST and record["stopped_early"]["metric"] == "eval_loss_other"
    assert min(seen, key=lambda step: seen[step]["eval_loss"]) > best
    guard = json.loads((run / "guard.json").read_text())
    assert [entry["value"] for entry in guard["evaluations"]] == [row["eval_loss_other"] for row in seen.values()]
    for flags, told in (
        (("--dataset", both, "--metric_for_best_model", "eval_loss_nobody"), "eval_loss_own, eval_loss_other"),
        (("--dataset", both, "--metric_for_best_model", "eval_loss_other", "--max_eval", "1"), "no question of"),
        (("--guard", "eval_loss_other:1"), "not a benchmark"),
    ):
        assert train(place, "refused", *flags)[0] == 2
        assert told in capsys.readouterr().err

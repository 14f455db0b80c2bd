"""Answer benchmarks and score the answers; compare base and tuned.

Everything an evaluation produces is on disk: predictions grow while it runs, a rerun goes on from them, and the results
are computed from them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm_sft.common import artifacts
from vlm_sft.common.console import progress
from vlm_sft.common.errors import EvaluationError
from vlm_sft.data.boxes import Convention
from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.splits import image_groups
from vlm_sft.distributed.collectives import barrier
from vlm_sft.evaluate.analysis import analyse
from vlm_sft.evaluate.backends import Backend, Reply
from vlm_sft.evaluate.batching import Pack, image_counter, plan_packs, rounds, share
from vlm_sft.evaluate.compare import compare_rows
from vlm_sft.evaluate.metrics import Benchmark
from vlm_sft.evaluate.pictures import picture_name
from vlm_sft.evaluate.provenance import PART, claim, mend_parts, part_files, read_rows
from vlm_sft.evaluate.scoring import score_rows, summarise
from vlm_sft.evaluate.tasks import Task, facts_of

# Of every line of predictions; what a benchmark needs besides follows them.
ROW_KEYS = frozenset("id image cluster image_pixels question prediction answers split score cut question_type".split())


class EvaluationStopped(Exception):
    """A run was asked to stop while it answered questions; every rank raises it at the same place."""


class StopRequest(Protocol):
    """Something that knows whether a run is to stop."""

    def asked(self) -> bool:
        """Whether this rank was asked to."""
        ...

    def stop_agreed(self) -> bool:
        """Whether any rank was; every rank must call it."""
        ...


class Evaluator:
    """Answers benchmarks with one backend.

    Args:
        backend: what answers.
        tokens_per_pack: token budget of one forward pass.
        rank, world_size: this process answers every `world_size`-th pack.
        replace: predictions of another model in a folder are removed; otherwise they are an error.
        stop: looked at between packs; None where nothing asks an evaluation to stop.
    """

    def __init__(
        self,
        backend: Backend,
        tokens_per_pack: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        replace: bool = False,
        stop: StopRequest | None = None,
    ) -> None:
        self.backend = backend
        self.tokens_per_pack = tokens_per_pack
        self.rank, self.world_size = rank, world_size
        self.in_step = backend.in_step
        self.replace = replace
        self.stop = stop
        self._image_tokens = image_counter(backend.encoder.processor)

    def run(self, task: Task, folder: Path, label: str, identity: dict[str, Any]) -> dict[str, Any]:
        """Answer one benchmark and score it; goes on from predictions that are already there.

        Args:
            task: the benchmark.
            folder: where predictions.jsonl and results.json go.
            label: what the progress bar says.
            identity: what answers, from `identity_of`.

        Returns:
            The summary that results.json holds (on rank 0; on other ranks {}).

        Raises:
            EvaluationError: the folder holds predictions of another model, and `replace` is off.
            EvaluationStopped: `stop` asked for it; what was answered is kept.
        """
        done = self._begin(folder, identity | {"max_new_tokens": task.max_new_tokens})
        began = time.monotonic()
        self._answer(task, folder, label, done)
        barrier(f"answer {task.name}")
        if self.stop is not None and self.stop.stop_agreed():
            raise EvaluationStopped
        seconds = time.monotonic() - began
        result = self._finish(task, folder, seconds, len(task.samples) - len(done)) if self.rank == 0 else {}
        barrier(f"score {task.name}")
        return result

    def _begin(self, folder: Path, identity: dict[str, Any]) -> set[str]:
        """Claim the folder, mend what a kill left, and return the ids that are answered; the same on every rank."""
        if self.rank == 0:
            claim(folder, identity, self.replace)
            mend_parts(folder)
        barrier("begin")
        done = set(read_rows(folder))
        barrier("read the answers that are there")
        return done

    def _answer(self, task: Task, folder: Path, label: str, done: set[str]) -> None:
        """Answer this rank's packs and write the rows as they come."""
        clusters = dict(zip((one.id for one in task.samples), image_groups(task.samples), strict=True))
        packs = plan_packs(task.samples, self._image_tokens, self.tokens_per_pack, self.backend.separate)
        own = share(packs, done, self.rank, self.world_size)
        total = sum(len(members) for pack in own for members in pack)
        with (
            (folder / PART.format(self.rank)).open("a", encoding="utf-8", errors=artifacts.UNENCODABLE) as stream,
            progress(total, label, "questions") as bar,
        ):
            answers = self.backend.answers(own + self._extra(packs, done, len(own)), task.max_new_tokens)
            for number, replies in enumerate(answers):
                if self._stop_now():
                    break
                if number >= len(own):
                    continue
                boxes = self.backend.encoder.boxes
                rows = [prediction_row(task.benchmark, reply, clusters[reply.sample.id], boxes) for reply in replies]
                stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                stream.flush()
                bar.advance(len(rows))

    def _stop_now(self) -> bool:
        """Where packs are computed in step the ranks must leave at the same one; elsewhere they meet afterwards."""
        if self.stop is None:
            return False
        return self.stop.stop_agreed() if self.in_step else self.stop.asked()

    def _extra(self, packs: list[Pack], done: set[str], own: int) -> list[Pack]:
        """Packs that this rank computes only because others have more of them and need it."""
        missing = rounds(packs, done, self.world_size) - own if self.in_step else 0
        return [packs[-1]] * missing

    def _finish(self, task: Task, folder: Path, seconds: float, new: int) -> dict[str, Any]:
        """Write predictions.jsonl in the order of the questions and results.json; the parts of the ranks go."""
        rows = read_rows(folder)
        missing = [sample.id for sample in task.samples if sample.id not in rows]
        if missing:
            raise EvaluationError(f"{len(missing)} questions have no prediction, e.g. {missing[0]}", "run it again")
        # Scored anew: the folder may hold answers that another rule has scored.
        ordered = [_with_facts(rows[sample.id], sample, task.benchmark) for sample in task.samples]
        scores = score_rows(task.benchmark, ordered, folder / artifacts.JUDGE)
        ordered = [row | {"score": score} for row, score in zip(ordered, scores, strict=True)]
        artifacts.write_jsonl(folder / artifacts.PREDICTIONS, ordered)
        for path in part_files(folder):
            path.unlink()
        path = folder / artifacts.RESULTS
        timing = {"seconds": round(seconds, 3), "questions_per_second": round(new / max(seconds, 1e-9), 3)}
        if new <= 0 and path.is_file():  # nothing was generated: the earlier figures are the true ones
            timing |= {key: value for key, value in artifacts.read_json(path).items() if key in timing}
        result = summarise(task.benchmark, ordered, scores) | {
            "schema": 1,
            "benchmark": task.name,
            "synthetic": task.synthetic,
            **timing,
            "max_new_tokens": task.max_new_tokens,
            "answer_tokens": task.answer_tokens,
            "tokens_per_pack": self.tokens_per_pack,
            "prompt": self.backend.encoder.prompt.to_dict(),
            "analysis": analyse(ordered),
        }
        artifacts.write_json(path, result)
        return result


def prediction_row(benchmark: Benchmark, reply: Reply, cluster: str, boxes: Convention) -> dict[str, Any]:
    """One line of predictions.jsonl; its score is set once all are answered.

    Args:
        benchmark: says what it needs of the question.
        reply: the question with its answer.
        cluster: the questions that it hangs together with through its images; told where there is not just one.
        boxes: how the model writes them, where the question declares some; the row has them in pixels.
    """
    sample, text, cut = reply
    answers = list(sample.answers)
    if sample.boxes is not None:
        text, answers = boxes.in_pixels(sample, text), [boxes.as_said(sample, answer) for answer in answers]
    row = {
        "id": sample.id,
        "image": picture_name(sample),
        **({"cluster": cluster} if len(sample.images) != 1 else {}),
        "image_pixels": sum(image.width * image.height for image in sample.images),
        "question": sample.shown_question,
        "prediction": text,
        "answers": answers,
        "split": sample.split,
        "score": None,
        "cut": cut,
        "question_type": str(sample.metadata.get("question_type", "")),
    }
    return _with_facts(row, sample, benchmark)


def _with_facts(row: dict[str, Any], sample: Sample, benchmark: Benchmark) -> dict[str, Any]:
    """A row of predictions with what its benchmark needs of the question, and nothing that another one needed."""
    row = {key: value for key, value in row.items() if key in ROW_KEYS}
    facts = facts_of(sample, benchmark)
    return row | {key: value for key, value in facts.items() if key not in row or key in benchmark.needs}


def results_table(tasks: Sequence[Task], folder: Path) -> dict[str, Any]:
    """Compare base and tuned on every benchmark from the files of an evaluation folder.

    Args:
        tasks: what was evaluated.
        folder: holds base/<benchmark>/ and tuned/<benchmark>/.

    Returns:
        The value of results.json.
    """
    benchmarks: dict[str, Any] = {}
    for task in tasks:
        sides = {}
        for side in ("base", "tuned"):
            sides[side] = artifacts.read_json(folder / side / task.name / artifacts.RESULTS)
        rows = [list(artifacts.read_jsonl(folder / side / task.name / artifacts.PREDICTIONS)) for side in sides]
        compared = compare_rows(*rows)
        benchmarks[task.name] = {
            "n": compared["n"],
            "clusters": compared["clusters"],
            "metric": task.benchmark.metric_name,
            "synthetic": task.synthetic,
            **{
                side: {key: sides[side][key] for key in ("accuracy", "interval", "seconds", "cut", "secondary")}
                for side in sides
            },
            **{key: sides["tuned"][key] for key in ("max_new_tokens", "answer_tokens")},
            "difference": compared["difference"],
            "difference_interval": compared["interval"],
            "p_value": compared["p_value"],
            "verdict": compared["verdict"],
            **{key: compared[key] for key in ("smallest_detectable_difference", "questions_needed", "clusters_needed")},
            "splits": {
                split: {
                    "n": values["n"],
                    "base": values["accuracy"],
                    "tuned": sides["tuned"]["splits"][split]["accuracy"],
                }
                for split, values in sides["base"]["splits"].items()
            },
            "analysis": _both_sides(sides["base"]["analysis"], sides["tuned"]["analysis"]),
        }
    return {"schema": 1, "benchmarks": benchmarks}


def _both_sides(base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """The tuned model's error analysis with the base's accuracy beside every category."""

    def before(dimension: str, category: str) -> float | None:
        return base["categories"].get(dimension, {}).get(category, {}).get("accuracy")

    return {
        "categories": {
            dimension: {
                name: {"n": values["n"], "base": before(dimension, name), "tuned": values["accuracy"]}
                for name, values in parts.items()
            }
            for dimension, parts in tuned["categories"].items()
        },
        "worst": [entry | {"base_accuracy": before(entry["dimension"], entry["category"])} for entry in tuned["worst"]],
    }

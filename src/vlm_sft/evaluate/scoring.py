"""Scores answers item by item and adds them up. No torch."""

from __future__ import annotations

import json
import math
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from vlm_sft.common import artifacts, console, formats
from vlm_sft.common.errors import EvaluationError, RunError, quoted
from vlm_sft.data.answer_limits import room_for
from vlm_sft.data.sources.spec import is_own
from vlm_sft.evaluate import statistics
from vlm_sft.evaluate.items import require_usable, why_unusable
from vlm_sft.evaluate.judge import HOW_TO_JUDGE
from vlm_sft.evaluate.metrics import BENCHMARKS, Benchmark, get_benchmark, scored

BAD_LINES_SHOWN = 20
VERDICTS = ".judge.jsonl"  # behind the name of a file of predictions: the verdicts of a judge on it
_LINES_A_STEP = 1000  # between two updates of the progress bar


def score_item(benchmark: str | Benchmark, row: dict[str, Any]) -> float:
    """Score one row of a predictions file.

    Args:
        benchmark: a benchmark, or its name. For the name of own data, the score recorded in the row is taken.
        row: an object with `id`, `prediction`, `answers`, or with `id` and `score`.

    Returns:
        The score, from 0 to 1.

    Raises:
        EvaluationError: the row cannot be scored; the message names its id.
    """
    published = BENCHMARKS.get(benchmark) if isinstance(benchmark, str) and not is_own(benchmark) else None
    if published is not None and published.grading is None:
        benchmark = published
    if isinstance(benchmark, Benchmark):
        require_usable(row, benchmark)
        return benchmark.score(row["prediction"], row["answers"], row)
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise EvaluationError(
            f"{benchmark}: item {quoted(row.get('id'))} has no 'score'",
            "use a known benchmark, pass --metric RULE, or write a score with each row",
        )
    return float(score)


def score_rows(benchmark: Benchmark, rows: Sequence[dict[str, Any]], verdicts: Path | None = None) -> list[float]:
    """Score the rows of a predictions file, one by one or together.

    Args:
        benchmark: whose rule scores them.
        rows: one that a judge gave no score gets 0, and `unjudged` in the row says so.
        verdicts: where a judge's verdicts are kept; None keeps none.

    Raises:
        EvaluationError: a row cannot be scored; the message names its id.
    """
    for row in rows:
        require_usable(row, benchmark)
    if benchmark.together is not None:
        scores = benchmark.together.scores(rows, verdicts)
        for row, score in zip(rows, scores, strict=True):
            row.pop("unjudged", None)
            row.update({"unjudged": True} if math.isnan(score) else {})
        return [0.0 if math.isnan(score) else score for score in scores]
    if benchmark.grading is not None:
        raise EvaluationError(f"{benchmark.name} is scored by a judge", HOW_TO_JUDGE)
    return [benchmark.score(row["prediction"], row["answers"], row) for row in rows]


@dataclass(slots=True)
class _Group:
    """The scores of one part of a benchmark: counts of each score, and the items one by one where images matter."""

    counts: Counter[float] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def add(self, score: float, image: Any = None) -> None:
        self.counts[score] += 1
        if image is not None:
            self.scores.append(score)
            self.images.append(image)

    def result(self) -> dict[str, Any]:
        n = self.counts.total()
        if self.images:
            interval = statistics.mean_interval(self.scores, self.images)
        else:
            interval = statistics.histogram_interval(self.counts)
        mean = math.fsum(score * count for score, count in self.counts.items()) / n
        return {"n": n, "accuracy": mean, "interval": list(interval)}


class Scoreboard:
    """Adds up the scores of a benchmark: overall, by split, by question type, and the secondary measures.

    Args:
        benchmark: whose rules score the items.
        by_image: keep every score with its image, so that the intervals respect that questions of one image belong
            together. Off, memory does not grow with the number of items, and the items count as independent.
    """

    def __init__(self, benchmark: Benchmark, by_image: bool) -> None:
        self.benchmark = benchmark
        self.by_image = by_image
        self._overall = _Group()
        self._splits: dict[str, _Group] = {}
        self._types: dict[str, _Group] = {}
        self._secondary = dict.fromkeys(benchmark.secondary, 0.0)
        self._cut = self._unjudged = 0

    def add(self, item: dict[str, Any], score: float) -> None:
        """Count a good item (see `why_unusable`) with its score."""
        prediction, answers = item["prediction"], item["answers"]
        image = statistics.cluster_of(item) if self.by_image else None
        self._overall.add(score, image)
        self._cut += item.get("cut") is True
        self._unjudged += item.get("unjudged") is True
        for groups, key in ((self._splits, item.get("split")), (self._types, item.get("question_type"))):
            if key and isinstance(key, str):
                groups.setdefault(key, _Group()).add(score, image)
        for name, metric in self.benchmark.secondary.items():
            self._secondary[name] += scored(metric, prediction, answers, item)

    def result(self) -> dict[str, Any]:
        """Return n, accuracy, interval, cut, splits, by_question_type and secondary; JSON values only.

        Raises:
            EvaluationError: nothing was scored.
        """
        n = self._overall.counts.total()
        if not n:
            raise EvaluationError(f"{self.benchmark.name}: nothing to score", "pass at least one prediction")
        return {
            "benchmark": self.benchmark.name,
            "metric": self.benchmark.metric_name,
            **({"metric_sha256": self.benchmark.source} if self.benchmark.source else {}),
            **self._overall.result(),
            "cut": self._cut,
            **({"unjudged": self._unjudged} if self._unjudged else {}),
            "splits": {name: group.result() for name, group in sorted(self._splits.items())},
            "secondary": {name: total / n for name, total in self._secondary.items()},
            "by_question_type": {name: group.result() for name, group in sorted(self._types.items())},
        }


def summarise(
    benchmark: str | Benchmark, rows: Iterable[dict[str, Any]], scores: Sequence[float] | None = None
) -> dict[str, Any]:
    """Score the rows of a predictions file and add them up.

    Args:
        benchmark: a benchmark, or its name.
        rows: objects with `id`, `prediction`, `answers`, and where known `image` (a key, the same for all questions of
            an image), `split`, `question_type`. A recorded `score` is not trusted: the rule is applied again.
        scores: of the rows, from `score_rows`; None applies the rule here.

    Returns:
        `benchmark`, `metric` (with `metric_sha256` where it is the user's), `n`, `accuracy` (0 to 1), `interval`
        ([low, high], 95 %, clustered by image), `cut` (answers that the limit of tokens ended), `splits` and
        `by_question_type` ({name: {n, accuracy, interval}}), `secondary` ({name: mean}), and
        where there are some `corpus` ({name: {n, accuracy, interval}}, of all rows together).

    Raises:
        EvaluationError: the benchmark is unknown, a row cannot be scored, or there is none.
    """
    board = Scoreboard(get_benchmark(benchmark) if isinstance(benchmark, str) else benchmark, by_image=True)
    listed = list(rows)
    for row, score in zip(listed, score_rows(board.benchmark, listed) if scores is None else scores, strict=True):
        board.add(row, score)
    return board.result() | _corpus(board.benchmark, listed)


def _corpus(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of all rows together, under their key; nothing where there are none."""
    corpus = benchmark.together.corpus if benchmark.together else {}
    return {"corpus": {name: score(rows) for name, score in corpus.items()}} if corpus else {}


@dataclass(slots=True)
class _BadLines:
    """The lines that could not be scored: the first few in full, all of them counted."""

    path: Path
    total: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, number: int, reason: str) -> None:
        self.total += 1
        if len(self.shown) < BAD_LINES_SHOWN:
            self.shown.append(f"  line {number}: {reason}")

    def message(self) -> str:
        more = [f"  ... and {self.total - len(self.shown):,} more"] if self.total > len(self.shown) else []
        count = "1 line" if self.total == 1 else f"{self.total:,} lines"
        return "\n".join([f"{self.path}: {count} cannot be scored", *self.shown, *more])


def _decode(line: bytes) -> Any:
    """Decode one JSON line.

    Raises:
        ValueError: it is not UTF-8 or not JSON; the message says which.
    """
    try:
        return artifacts.parse_json(line.decode("utf-8"), strict=False, unique=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON that can be read: {error}") from error


def _items(stream: BinaryIO, benchmark: Benchmark, bad: _BadLines) -> Iterator[dict[str, Any]]:
    """Yield the good items of a file, line by line, and note the bad ones; blank lines are passed over."""
    size = os.fstat(stream.fileno()).st_size
    with console.progress(size, "scoring", "B") as bar:
        pending = 0
        for number, line in enumerate(stream, start=1):
            pending += len(line)
            if number % _LINES_A_STEP == 0:
                bar.advance(pending)
                pending = 0
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                item = _decode(line)
            except ValueError as error:
                bad.add(number, str(error))
                continue
            reason = why_unusable(item, benchmark)
            if reason:
                bad.add(number, reason)
            else:
                yield item
        bar.advance(pending)


def _open_predictions(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise EvaluationError(
            f"cannot read {path}: {error.strerror}", "pass a file with one JSON object a line: id, prediction, answers"
        ) from error


@contextmanager
def _per_item_writer(path: Path | None, predictions: Path) -> Iterator[IO[str] | None]:
    """Open the file of per-item scores; it appears under its name only when the block ends well."""
    if path is None:
        yield None
        return
    if path.exists() and (not path.is_file() or path.samefile(predictions)):
        raise RunError(f"cannot write the scores to {path}", "choose a new file, other than the predictions")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        )
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "choose a folder that you may write to") from error
    try:
        with stream:
            yield cast(IO[str], stream)
        os.chmod(stream.name, artifacts.FILE_MODE)
        os.replace(stream.name, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "make room on the disk") from error
    finally:
        Path(stream.name).unlink(missing_ok=True)


def score_file(
    benchmark: str | Benchmark,
    predictions: str | Path,
    per_item: str | Path | None = None,
    skip_bad_lines: bool = False,
) -> dict[str, Any]:
    """Score a predictions file of any length; memory does not grow with its lines but for 8 bytes each.

    Args:
        benchmark: a benchmark, or its name.
        predictions: JSON lines, each `{"id", "prediction", "answers": [...], "split"?}`.
        per_item: where to write one `{"id", "score"}` a scored line, in order; None writes none.
        skip_bad_lines: score the rest when some lines are bad; otherwise one bad line is an error.

    Returns:
        What `summarise` returns, with `skipped` (bad lines passed over) and `duplicate_ids` (items whose id an earlier
        one had; they are scored). Items count as independent in the intervals.

    Raises:
        EvaluationError: an unknown benchmark, an unreadable file, nothing to score, or bad lines (the first 20 with
            their numbers). Nothing is written then.
        RunError: `per_item` cannot be written.
    """
    board = Scoreboard(get_benchmark(benchmark) if isinstance(benchmark, str) else benchmark, by_image=False)
    source = Path(predictions)
    bad = _BadLines(source)
    hashes = array("q")
    corpus: dict[str, Any] = {}
    with _open_predictions(source) as stream, _per_item_writer(Path(per_item) if per_item else None, source) as out:
        items = _items(stream, board.benchmark, bad)
        if board.benchmark.together is not None or board.benchmark.grading is not None:  # these have to be in memory
            listed = list(items)
            scores = score_rows(board.benchmark, listed, source.with_name(source.name + VERDICTS)) if listed else []
            scored_items: Iterable[tuple[dict[str, Any], float]] = zip(listed, scores, strict=True)
            corpus = _corpus(board.benchmark, listed) if listed else {}
        else:
            scored_items = ((item, score_item(board.benchmark, item)) for item in items)
        for item, score in scored_items:
            board.add(item, score)
            hashes.append(hash(repr(item["id"])))
            if out is not None:
                out.write(json.dumps({"id": item["id"], "score": score}) + "\n")
        if bad.total and not skip_bad_lines:
            raise EvaluationError(bad.message(), "fix these lines, or pass --skip_bad_lines to score the others")
        if not hashes:
            reason = bad.message() if bad.total else f"{source} is empty"
            raise EvaluationError(reason, "pass one JSON object a line: id, prediction, answers")
        result = board.result() | corpus
    if bad.total:
        console.warn(f"{bad.message()}\nskipped (--skip_bad_lines)")
    result |= {"skipped": bad.total, "duplicate_ids": _count_duplicates(hashes)}
    if result["duplicate_ids"]:
        console.warn(f"{source}: {result['duplicate_ids']:,} items repeat an earlier id; all were scored")
    return result


def _count_duplicates(hashes: array[int]) -> int:
    import numpy as np

    return len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.int64)))


def format_score(result: dict[str, Any]) -> str:
    """Lay the result of `score_file` or `summarise` out as lines for a person."""

    def line(name: str, part: dict[str, Any]) -> str:
        interval = formats.percent_interval(tuple(part["interval"]))
        return f"{name:<24} {part['n']:>9,}   {formats.percent(part['accuracy']):>7}   {interval}"

    lines = [f"{result['metric']:<24} {'n':>9}   {'mean':>7}   95 % interval", line("all", result)]
    lines += [line(f"split {name}", part) for name, part in result["splits"].items()]
    lines += [line(name, part) for name, part in result.get("corpus", {}).items()]
    for name, value in result["secondary"].items():  # your own rule may return any number
        shown = formats.percent(value) if 0 <= value <= 1 else formats.number(value)
        lines.append(f"{name:<24} {result['n']:>9,}   {shown:>7}")
    if result.get("unjudged"):
        lines.append(f"{'unjudged, count as wrong':<24} {result['unjudged']:>9,}")
    if result.get("cut"):
        lines.append(f"{'cut by the limit':<24} {result['cut']:>9,}")
        lines.append(why_cut(result["cut"], result["n"], result.get("max_new_tokens"), result.get("answer_tokens")))
    return "\n".join(lines)


def why_cut(cut: int, n: int, limit: int | None, longest: int | None) -> str:
    """Say what answers that the limit ended mean for a score, and what to do.

    Args:
        cut: how many answers the limit ended; at least one.
        n: of so many.
        limit: of an answer, in tokens; None where not recorded.
        longest: tokens of the longest expected answer; None or 0 where not recorded.
    """
    ended = f"{cut:,} of {n:,} answers ended at the limit{f' of {limit:,} tokens' if limit else ''}, not by themselves"
    if not limit or not longest:
        return f"{ended}: where the expected answers are longer, this explains a low score; raise --max_new_tokens"
    if longest > limit:
        room = room_for(longest)
        return (
            f"{ended}, and the longest expected one has {longest:,}: the limit is the likely reason for a low score; "
            f"evaluate with --max_new_tokens {room:,}"
        )
    return (
        f"{ended}; the expected ones fit (the longest has {longest:,}), so the model does not end its answers where it "
        "should: more training helps, a higher limit does not"
    )

"""Metrics of the user's own: the rule of own data, built in or a function; further scores beside a benchmark's rule."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_sft.common.errors import EvaluationError, nearest, quoted
from vlm_sft.common.options import is_function
from vlm_sft.data.sources.spec import is_own
from vlm_sft.evaluate import grading
from vlm_sft.evaluate.captions import CAPTION_RULES, caption_scores, corpus_bleu, require_captions
from vlm_sft.evaluate.grading import general_grading
from vlm_sft.evaluate.judge import HOW_TO_JUDGE, Judge, judged_scores, parse_judge
from vlm_sft.evaluate.metrics import BENCHMARKS, Benchmark, Metric, Together

if TYPE_CHECKING:
    from vlm_sft.evaluate.tasks import Task

# What `--metric` takes -> the benchmark whose rule it is. The names are metrics of `metric_for_best_model` too.
RULES = {
    "exact_match": "exact_match",
    "relaxed_accuracy": "chartqa",
    "vqa_accuracy": "textvqa",
    "anls": "docvqa",
    "multiple_choice": "multiple_choice",
    "squad_f1": "squad",
    "contains": "ocrbench",
    "relaxed_anls": "chartqapro",
}
JUDGE = "judge"  # the rule of own data that a judge grades
RULE_NAMES = (*RULES, *CAPTION_RULES, JUDGE)
SIGNATURE = "def metric(prediction: str, answers: list[str], row: dict | None) -> float"
_loaded: dict[str, str] = {}  # modules of the user -> the source that they were loaded from
_SHAPE = "a metric takes (prediction, answers), a text and a list of texts, and returns a finite number"


@dataclass(frozen=True)
class OwnMetric:
    """A function of the user that scores one answer; its mistakes are told with the row.

    Attributes:
        name: what messages call it.
        function: takes (prediction, answers), or the row of the predictions file besides.
        shape: what it should be, for messages.
        highest: the greatest score; infinity where any number will do.
    """

    name: str
    function: Callable[..., Any]
    shape: str = _SHAPE
    highest: float = math.inf
    takes_row: ClassVar[bool] = True

    def __call__(self, prediction: str, answers: Sequence[str], row: Mapping[str, Any] | None = None) -> float:
        """Score one answer.

        Raises:
            EvaluationError: the function fails, or returns no number in its range.
        """
        where = f" on {quoted(row['id'])}" if row is not None and "id" in row else ""
        known = {key: value for key, value in row.items() if key != "score"} if row is not None else None
        more = (known,) if _takes(self.function, 3) else ()
        try:
            value = self.function(prediction, list(answers), *more)
        except EvaluationError:
            raise
        except Exception as error:
            what = f"the metric {quoted(self.name)} failed{where}, prediction {quoted(prediction)}: {_told(error)}"
            raise EvaluationError(what, self.shape) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        lowest = -self.highest if math.isinf(self.highest) else 0.0
        if not (math.isfinite(number) and lowest <= number <= self.highest):
            raise EvaluationError(
                f"the metric {quoted(self.name)} gave {quoted(value)}{where} for {quoted(prediction)}", self.shape
            )
        return number


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments in their order."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of no known signature
        return count == 2
    return True


def _told(error: BaseException) -> str:
    """An error of the user's code, with the line that raised it."""
    last = traceback.TracebackException.from_exception(error).stack[-1:]
    place = f" ({last[0].filename} line {last[0].lineno})" if last and not isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}: {error}{place}"


def with_secondary(rules: Benchmark, metrics: Mapping[str, Metric]) -> Benchmark:
    """The rules of a benchmark with further secondary scores."""
    return replace(rules, secondary={**rules.secondary, **metrics}) if metrics else rules


def with_metrics(tasks: list[Task], metrics: Mapping[str, Metric]) -> list[Task]:
    """Add secondary scores to tasks.

    Args:
        tasks: benchmarks with their questions.
        metrics: by name: (prediction, answers) to a number.
    """
    return [replace(task, benchmark=with_secondary(task.benchmark, metrics)) for task in tasks]


def named(metrics: Sequence[Metric] | Mapping[str, Metric]) -> dict[str, Metric]:
    """Give metrics their names: those of the functions, where they come as a list.

    Args:
        metrics: functions of (prediction, answers) or (prediction, answers, row), each of which gives a number.

    Raises:
        EvaluationError: two have one name, or one cannot be called.
    """
    pairs = list(metrics.items()) if isinstance(metrics, Mapping) else [(_name(metric), metric) for metric in metrics]
    for name, metric in pairs:
        if not callable(metric):
            raise EvaluationError(f"the metric {quoted(name)} is {quoted(metric)}, not a function", _SHAPE)
    found: dict[str, Metric] = {name: OwnMetric(name, metric) for name, metric in pairs}
    if len(found) < len(pairs):
        raise EvaluationError("two metrics have the same name", "pass a dict of names and functions")
    return found


def _name(metric: Metric) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


def metric_text(metric: str | Callable[..., Any]) -> str:
    """A rule as `--metric` writes it; a function must be found again by its module and name.

    Raises:
        EvaluationError: it is a function that is not, such as a lambda.
    """
    if isinstance(metric, str):
        return metric
    text = f"{getattr(metric, '__module__', '')}:{_name(metric)}"
    module = sys.modules.get(text.partition(":")[0])
    if not is_function(text) or getattr(module, _name(metric), None) is not metric:
        raise EvaluationError(
            f"the metric {quoted(metric)} has no name in a module, so its version could not be recorded",
            f"define it at the top of a module or notebook: {SIGNATURE}",
        )
    return text


def parse_metrics(text: str | None, own: Sequence[str]) -> dict[str, Benchmark]:
    """Read `--metric`: one rule for all own data, or `NAME=RULE,…`.

    Args:
        text: the flag; a rule is one of `RULE_NAMES`, or `module:function` of the user's own; None for none.
        own: the names of the own data sets that are scored.

    Returns:
        Rules by the name of the data set; a set that is not named keeps exact match.

    Raises:
        EvaluationError: a set is not own data or is named twice, there is no such rule, or a function cannot be used.
    """
    found: dict[str, Benchmark] = {}
    for entry in text.split(",") if text is not None else []:
        name, equals, rule = (part.strip() for part in entry.rpartition("="))
        targets = [name] if equals else list(dict.fromkeys(own))
        if not own:
            raise EvaluationError(
                f"--metric {text}: no own data is scored here; published benchmarks have their authors' rule",
                "leave it out, or add a file of your own",
            )
        wrong = [target for target in targets if target not in own]
        if wrong or (not equals and text != entry) or any(target in found for target in targets):
            what = f"{quoted(wrong[0])} is no own data set here" if wrong else f"{quoted(entry)} is one entry too many"
            fix = f"pass one rule, or NAME=RULE of {', '.join(dict.fromkeys(own))}, comma separated"
            raise EvaluationError(f"--metric {text}: {what}", fix)
        found |= {target: rule_of(rule, target) for target in targets}
    return found


def chosen_rules(
    names: Sequence[str], metric: str | None, judge: str | None = None, judge_model: str | None = None
) -> dict[str, Benchmark]:
    """The rules that the flags choose for some benchmarks: those of own data, and those that a judge grades.

    Args:
        names: of the benchmarks.
        metric, judge, judge_model: as of the flags.

    Returns:
        By name; benchmarks that are not in it keep the rule of their authors, own data exact match.

    Raises:
        EvaluationError: a flag has mistakes, a benchmark needs a judge, or nothing is there to be judged.
    """
    grader = parse_judge(judge, judge_model)
    rules = parse_metrics(metric, [name for name in names if is_own(name)])
    published = {name: BENCHMARKS[name] for name in names if name in BENCHMARKS and not is_own(name)}
    return judged_by(grader, rules | {name: one for name, one in published.items() if one.grading is not None})


def judged_by(grader: Judge | None, rules: Mapping[str, Benchmark]) -> dict[str, Benchmark]:
    """Let a judge grade those benchmarks that need one.

    Raises:
        EvaluationError: one needs a judge and there is none, or there is one and none needs it.
    """
    judged = [name for name, benchmark in rules.items() if benchmark.grading is not None]
    if judged and grader is None:
        raise EvaluationError(f"{', '.join(judged)}: answers are graded by a judge, and there is none", HOW_TO_JUDGE)
    if grader is not None and not judged:
        raise EvaluationError(
            "--judge: nothing here is judged", "pass --metric judge for your own data, or leave it out"
        )
    return {name: _graded(grader, rule) if name in judged and grader else rule for name, rule in rules.items()}


def _graded(grader: Judge, rules: Benchmark) -> Benchmark:
    prompt_of = rules.grading
    assert prompt_of is not None
    together = Together(lambda rows, verdicts: judged_scores(grader, prompt_of, rows, verdicts))
    return replace(rules, together=together, source=grader.fingerprint(inspect.getsource(grading)))


def is_rule(text: str) -> bool:
    """Whether a text is a rule of own data, rather than another metric: one of `RULE_NAMES`, or module:function."""
    return text in RULE_NAMES or is_function(text)


def rule_of(rule: str, name: str | None = None) -> Benchmark:
    """The rules of own data.

    Args:
        rule: one of `RULE_NAMES`, or `module:function`; the module is looked for in the working directory first.
        name: of the data; that of the rule by default.

    Raises:
        EvaluationError: there is no such rule, or the function or library cannot be used.
    """
    name = rule if name is None else name
    if rule in CAPTION_RULES:
        require_captions()
        corpus = {"corpus_bleu4": corpus_bleu} if rule == "bleu4" else {}
        together = Together(partial(caption_scores, rule), corpus)
        return replace(BENCHMARKS["exact_match"], name=name, metric_name=rule, together=together)
    if rule == JUDGE:
        return replace(BENCHMARKS["exact_match"], name=name, metric_name=rule, grading=general_grading)
    if rule in RULES:
        return replace(BENCHMARKS[RULES[rule]], name=name, metric_name=rule)
    if not is_function(rule):
        guess = nearest(rule, RULE_NAMES, "did you mean {}? ")
        known = (
            f"known are {', '.join(RULE_NAMES)}; your own is module:function, e.g. my_rules:score for my_rules.py here"
        )
        raise EvaluationError(f"--metric: there is no rule {quoted(rule)}", guess + known)
    function, source = _load(rule)
    shape = f"it should be `{SIGNATURE}`, a number from 0 to 1"
    metric = OwnMetric(rule, function, shape, 1.0)
    return Benchmark(name, rule, metric, f"your own data: {rule}", source=source)


def _load(rule: str) -> tuple[Callable[..., Any], str]:
    """Import the function of `module:function`, with the SHA-256 of the source of its module.

    Of a script or notebook only the function's own source counts.

    Raises:
        EvaluationError: the module cannot be imported, or has no such function that takes two or three arguments.
    """
    module_name, _, name = rule.partition(":")
    try:
        with _working_directory_first():
            module = importlib.import_module(module_name)
            source = "" if module_name == "__main__" else _source(rule, module)
            if _loaded.setdefault(module_name, source) != source:  # edited since, in a notebook
                module = importlib.reload(module)
                _loaded[module_name] = source
    except EvaluationError:
        raise
    except (Exception, SystemExit) as error:
        fix = f"it has to be {module_name.replace('.', '/')}.py below {Path.cwd()}, or an installed module"
        raise EvaluationError(f"--metric {rule}: importing {module_name} failed: {_told(error)}", fix) from error
    function = getattr(module, name, None)
    if not callable(function) or not (_takes(function, 2) or _takes(function, 3)):
        place = getattr(module, "__file__", None) or module_name
        what = "has no such function" if function is None else f"is {quoted(function)}, not a function of two or three"
        raise EvaluationError(f"--metric {rule}: {place} {what}", f"define there: {SIGNATURE}")
    return function, _source(rule, function) if module_name == "__main__" else source


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Let modules of the working directory be found, and go before installed ones of the same name."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _source(rule: str, what: Any) -> str:
    """SHA-256 of the source of a module or function.

    Raises:
        EvaluationError: there is none.
    """
    try:
        text = inspect.getsource(what)
    except (OSError, TypeError) as error:
        problem = f"--metric {rule}: it has no Python source, which tells its versions apart"
        raise EvaluationError(problem, f"wrap it in a module of your own: {SIGNATURE}") from error
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def recorded_sources(rules: Iterable[Benchmark]) -> dict[str, str]:
    """The user's functions among some rules: name -> fingerprint of its source."""
    return {rule.metric_name: rule.source for rule in rules if rule.source}

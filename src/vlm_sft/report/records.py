"""What a report knows of a run, as dataclasses; whatever an artifact does not hold is None or empty.

May import evaluate, report.formats and report.predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlm_sft.common import formats
from vlm_sft.evaluate.compare import TOO_FEW, few_line
from vlm_sft.evaluate.overlap import cautions
from vlm_sft.evaluate.scoring import why_cut
from vlm_sft.report.predictions import Prediction

Interval = tuple[float, float]
PLOTTABLE = 1e15  # matplotlib cannot scale an axis up to the largest float; a loss beyond this is no number to look at


@dataclass(frozen=True, slots=True)
class Score:
    """One model on one benchmark: accuracy (0 to 1), 95 % interval, seconds, answers that the limit of tokens ended."""

    accuracy: float | None
    interval: Interval | None
    seconds: float | None
    cut: int = 0

    @property
    def told(self) -> str:
        """Percent with the interval, e.g. "62.1 [58.0, 66.1]"."""
        return f"{formats.percent(self.accuracy)} {formats.percent_interval(self.interval)}".strip()


@dataclass(frozen=True, slots=True)
class SplitScore:
    """Accuracies (0 to 1) on one part of a benchmark."""

    name: str
    n: int | None
    base: float | None
    tuned: float | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of the headline table; `difference` is tuned minus base, as a fraction.

    `max_new_tokens` is the limit of an answer, `answer_tokens` what the longest expected one has.
    """

    name: str
    n: int | None
    metric: str
    synthetic: bool
    base: Score | None
    tuned: Score | None
    difference: float | None
    difference_interval: Interval | None
    p_value: float | None
    verdict: str
    splits: tuple[SplitScore, ...]
    clusters: int | None = None
    needed: tuple[int, int] | None = None  # questions and independent images that could judge it
    also_chose: int = 0  # questions about images that chose the checkpoint too
    also_trained: int = 0  # questions about images that were trained on
    max_new_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def title(self) -> str:
        """Its name, which says of drawn data that it is."""
        return f"{self.name} (synthetic)" if self.synthetic else self.name

    @property
    def cut_notes(self) -> tuple[str, ...]:
        """What answers that the limit ended mean for base and tuned; none where every answer ended by itself."""
        sides = (("base", self.base), ("tuned", self.tuned))
        return tuple(
            f"{self.name}, {side}: {why_cut(score.cut, self.n, self.max_new_tokens, self.answer_tokens)}"
            for side, score in sides
            if score and score.cut and self.n
        )

    @property
    def seconds(self) -> float | None:
        """Seconds of both evaluations together."""
        known = [score.seconds for score in (self.base, self.tuned) if score and score.seconds is not None]
        return sum(known) if known else None

    @property
    def direction(self) -> str:
        """`better`, `worse` or `same`, as the verdict says, or where there is none as the interval does: the colour."""
        if self.verdict or self.difference_interval is None:
            return self.verdict if self.verdict in ("better", "worse") else "same"
        low, high = self.difference_interval
        return "better" if low > 0 else "worse" if high < 0 else "same"

    @property
    def cautions(self) -> list[str]:
        """What a reader of this row has to know, as sentences without a full stop."""
        few = [self._too_few()] if self.verdict == TOO_FEW else []
        return few + cautions(self.name, self.n or 0, self.also_chose, self.also_trained)

    def _too_few(self) -> str:
        """What it would take to judge it."""
        if self.needed is None or self.clusters is None:
            return f"{self.name}: {formats.count(self.n)} questions are {TOO_FEW}"
        return few_line(self.name, self.n or 0, self.clusters, self.difference or 0.0, self.needed)


@dataclass(frozen=True, slots=True)
class Best:
    """The step that load_best_model_at_end chose, by which metric, and its value."""

    step: int
    metric: str
    value: float | None


QUANTITIES: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "time_seconds": ("Time", formats.duration),
    "peak_bytes": ("Peak memory", formats.size),
    "disk_bytes": ("Disk", formats.size),
}


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was expected of one quantity before the run, and what came.

    Attributes:
        quantity: a key of QUANTITIES; seconds or bytes.
        value, interval: the forecast, and where 90 % of the outcomes should lie.
        actual: what came; None while the run goes on.
        items: what the forecast is made of.
    """

    quantity: str
    value: float | None
    interval: Interval | None
    actual: float | None
    items: dict[str, float]

    @property
    def label(self) -> str:
        """The quantity's name."""
        return QUANTITIES[self.quantity][0]

    def text(self, value: float | None) -> str:
        """A value of this quantity with its unit."""
        return QUANTITIES[self.quantity][1](value)

    @property
    def error(self) -> float | None:
        """By which fraction of the actual value the forecast was too high (below zero: too low)."""
        return self.value / self.actual - 1 if self.value is not None and self.actual else None

    @property
    def held(self) -> bool | None:
        """Whether the actual value lies within the interval; None while that is not known."""
        if self.interval is None or self.actual is None:
            return None
        return self.interval[0] <= self.actual <= self.interval[1]


@dataclass(frozen=True, slots=True)
class GuardStep:
    """One guarded benchmark at one evaluation: scores from 0 to 1; `floor` is how far the score may fall."""

    step: int
    benchmark: str
    base: float
    score: float
    floor: float
    qualifies: bool


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie from each edge up to the next; there is one edge more than counts."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of run.json; a value that is not there is None or empty."""

    status: str
    command: tuple[str, ...]
    started: str
    finished: str
    wall_seconds: float | None
    seconds: dict[str, float]
    output_dir: str
    base_model: str
    adapter: str
    datasets: tuple[str, ...]
    device: str
    world_size: int | None
    parallel: str
    attention: str
    dtype: str
    lora: dict[str, str]
    trainable_parameters: int | None
    total_parameters: int | None
    steps: int | None
    planned_steps: int | None
    loss_shares: dict[str, float]
    questions_seen: int | None
    best: Best | None
    stopped_early: str
    bytes: dict[str, float]
    peak_memory_bytes: int | None
    versions: dict[str, str]
    git_hash: str
    git_dirty: bool | None
    notes: tuple[str, ...]
    forecasts: tuple[Forecast, ...]
    forecast_basis: str
    forecast_assumptions: tuple[str, ...]

    @property
    def training_seconds(self) -> float | None:
        """Seconds of the training alone, of the whole run where they were not recorded."""
        return self.seconds.get("train", self.wall_seconds)

    @property
    def recipe_name(self) -> str:
        """The recipe file named on the command line, without its folder; "" when there was none."""
        for position, word in enumerate(self.command):
            flag, _, value = word.partition("=")
            if flag == "--sft_config":
                following = self.command[position + 1 : position + 2]
                return Path(value or (following[0] if following else "")).name
        return ""


@dataclass(frozen=True, slots=True)
class DataPart:
    """Counts of the training or the evaluation part of the data."""

    samples: int | None
    images: int | None
    supervised_tokens: int | None
    image_tokens: int | None
    prompt_tokens: int | None
    questions_per_image: dict[str, float]
    by_dataset: dict[str, float]
    synthetic: tuple[str, ...]
    token_histograms: dict[str, Histogram]


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The content of data.json."""

    train: DataPart | None
    eval: DataPart | None
    left_out: dict[str, float]


@dataclass(frozen=True, slots=True)
class LeftOutRow:
    """One sample that was left out, and why."""

    id: str
    reason: str
    detail: str


@dataclass(slots=True)
class RunReport:
    """Everything a report shows of one run.

    Attributes:
        folder: the run folder.
        name: its name, unique among the runs of one report.
        series: metric name to (step, value) pairs, in the order of the steps.
        checksums: file name to SHA-256, of the files that define the run and its result.
        problems: one sentence for every artifact or value that could not be read.
        is_evaluation: `vlm-sft eval` wrote it: one model, no training.
        Others: None or empty where the artifact does not exist (yet).
    """

    folder: Path
    name: str
    record: RunRecord | None = None
    recipe: dict[str, str] = field(default_factory=dict)
    data: DataFacts | None = None
    left_out: tuple[LeftOutRow, ...] = ()
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    benchmarks: tuple[Benchmark, ...] = ()
    guard: tuple[GuardStep, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_evaluation: bool = False

    @property
    def status(self) -> str:
        """The status of run.json, or `unknown`."""
        return (self.record.status if self.record else "") or "unknown"

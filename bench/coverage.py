"""How often the intervals hold the truth with few images, and whether interval and test ever disagree.

    python bench/coverage.py

Simulates models that answer questions about few images of unequal sizes, with answers that hang together within an
image, and writes a table into bench/README.md. Imports evaluate.statistics; takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from common import RESULTS, commit, origin, write_block, write_record
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.evaluate import statistics

IMAGES = (3, 4, 5, 6, 8, 12, 20, 30)
CORRELATIONS = (0.0, 0.3, 0.8)
QUESTIONS = 5.0  # an image, on average; their number is spread like a geometric one
RESULT = RESULTS / "coverage.json"


@dataclass(frozen=True)
class World:
    """A base and a tuned model.

    Attributes:
        right: share of the questions that the base answers rightly.
        gained, lost: share of the wrong ones that training mends, and of the right ones that it spoils.
    """

    right: float
    gained: float
    lost: float

    @property
    def difference(self) -> float:
        """The true difference of their accuracies."""
        return (1 - self.right) * self.gained - self.right * self.lost

    @property
    def tuned(self) -> float:
        """The true accuracy of the tuned model."""
        return self.right + self.difference


WORLDS = (
    World(0.5, 0.2, 0.2),
    World(0.5, 0.5, 0.1),
    World(0.02, 0.4, 0.0),
    World(0.8, 0.2, 0.02),
    World(0.9, 0.05, 0.01),
    World(0.1, 0.9, 0.1),
)


def draw(world: World, images: int, correlation: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw the scores of both models and the image of each question.

    Args:
        world: the true shares; each image has its own, drawn from beta distributions around them.
        images: how many there are.
        correlation: of two questions of one image, 0 to 1.
        rng: of all draws.

    Returns:
        Base scores, tuned scores and image numbers, one a question.
    """
    image = np.repeat(np.arange(images), rng.geometric(1 / QUESTIONS, images))
    right, gained, lost = (
        _own(share, images, correlation, rng)[image] for share in (world.right, world.gained, world.lost)
    )
    base = rng.random(len(image)) < right
    changed = rng.random(len(image)) < np.where(base, lost, gained)
    return base.astype(float), (base ^ changed).astype(float), image


def _own(share: float, images: int, correlation: float, rng: np.random.Generator) -> np.ndarray:
    if not correlation or share in (0.0, 1.0):
        return np.full(images, share)
    concentration = 1 / correlation - 1
    return rng.beta(share * concentration, (1 - share) * concentration, images)


def cell(world: World, images: int, correlation: float, trials: int, seed: int) -> dict[str, Any]:
    """Simulate one combination.

    Returns:
        Shares of the trials: `difference` and `accuracy` (the interval holds the truth), `found` (p < 0.05),
        `percentile` (the percentile bootstrap over images would hold it), `disagree` (interval against test); `width`:
        of the interval of the difference.
    """
    rng = np.random.default_rng([seed, images, round(10 * correlation), round(1000 * world.tuned)])
    sums = dict.fromkeys(("difference", "accuracy", "percentile", "found", "disagree", "width"), 0.0)
    for _ in range(trials):
        base, tuned, image = draw(world, images, correlation, rng)
        result = statistics.paired_test(base, tuned, image.tolist())
        low, high = statistics.mean_interval(tuned, image.tolist())
        resampled = _percentile_bootstrap(tuned - base, image, images, rng)
        sums["difference"] += result.low <= world.difference <= result.high
        sums["accuracy"] += low <= world.tuned <= high
        sums["percentile"] += resampled[0] <= world.difference <= resampled[1]
        sums["found"] += result.p_value < statistics.LEVEL
        sums["disagree"] += (result.low > 0 or result.high < 0) != (result.p_value < statistics.LEVEL)
        sums["width"] += result.high - result.low
    return {**asdict(world), "images": images, "correlation": correlation} | {
        name: value / trials for name, value in sums.items()
    }


def _percentile_bootstrap(
    difference: np.ndarray, image: np.ndarray, images: int, rng: np.random.Generator
) -> tuple[float, float]:
    counts = rng.multinomial(images, np.full(images, 1 / images), size=500)
    means = (counts @ np.bincount(image, difference, images)) / (counts @ np.bincount(image, minlength=images))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(result: dict[str, Any]) -> str:
    """The smallest and the mean coverage of each number of images."""
    lines = [
        "| images | difference: least / mean coverage | accuracy: least / mean | percentile bootstrap: least / mean | "
        "found where nothing differs, at most | interval against test | commit |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for images in IMAGES:
        cells = [one for one in result["cells"] if one["images"] == images]
        shares = [
            f"{min(one[name] for one in cells):.1%} / {np.mean([one[name] for one in cells]):.1%}"
            for name in ("difference", "accuracy", "percentile")
        ]
        null = max(one["found"] for one in cells if World(one["right"], one["gained"], one["lost"]).difference == 0)
        against = sum(one["disagree"] for one in cells) * result["trials"]
        lines.append(f"| {images} | {' | '.join(shares)} | {null:.1%} | {against:.0f} | {commit(result)} |")
    return "\n".join(lines)


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: simulations of each combination."""
    return {"trials": result["trials"]}


def main() -> int:
    """Simulate all combinations and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="of each combination (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = origin() | {"trials": args.trials, "seed": args.seed, "questions": QUESTIONS}
    result["cells"] = [
        cell(world, images, correlation, args.trials, args.seed)
        for world, correlation, images in product(WORLDS, CORRELATIONS, IMAGES)
    ]
    write_record(RESULT, result, covered)
    write_block("coverage", "Intervals with few images", table(artifacts.read_json(RESULT)))
    say(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

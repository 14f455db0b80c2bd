"""The trainings of the recipe benchmark: which there are, their command lines, and running those that are not done.

Everything goes through the command line of the package. A finished run is never repeated, an interrupted one is
continued, so the benchmark can be stopped at any time.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.evaluate.provenance import identity_of
from vlm_sft.evaluate.tasks import dataset_text, names_of
from vlm_sft.model.load import find_base
from vlm_sft.recipe.load import read_recipe

RECIPES = {  # in the order of their cost
    "smoketest": "configs/sft_config_smoketest.json",
    "1epoch": "configs/sft_config_1epoch.json",
    "2epoch": "configs/sft_config.json",
    "5epoch": "configs/sft_config_5epoch.json",
    "best": "configs/sft_config_best.json",
}
AS_IS = "as is"
REFERENCE = "reference"
FORGETTING_RECIPE = "best"  # the longest training forgets most
LORA = {"lora_r": 16, "lora_alpha": 32, "target_modules": "q_proj,v_proj,o_proj"}
NOTES = "bench.json"  # beside a run: how often it was interrupted
# One value of the best recipe at a time, the others as they are; learning rates are multiples of the reference's.
LEARNING_RATE_FACTORS = (0.1, 0.3, 3.0)
ABLATIONS: tuple[dict[str, Any], ...] = (
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "constant_with_warmup"},
    {"warmup_ratio": 0.0},
    {"warmup_ratio": 0.2},
    {"weight_decay": 0.0},
    {"weight_decay": 0.1},
    {"num_train_epochs": 1},
    {"num_train_epochs": 3},
    {"lora_r": 4, "lora_alpha": 8},
    {"lora_r": 64, "lora_alpha": 128},
    {"target_modules": "q_proj,v_proj"},
    {"target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"},
)


@dataclass(frozen=True)
class Settings:
    """What all runs of one benchmark share.

    Attributes:
        base_model: "pocket", a folder or a Hub id.
        dataset: data sets in the grammar of `--dataset`.
        max_train, max_eval: questions of a training, and of each benchmark; None for all.
        seeds: one training each.
        learning_rate, global_batch_size: of the variant beside the recipes as they are; None for what the recipe has.
        launcher: the words before the verb, e.g. deepspeed --num_gpus=8 --module vlm_sft.
        flash_attn: pass `--flash_attn`.
        work_dir: folder of the runs and their cache.
    """

    base_model: str
    dataset: str
    max_train: int | None
    max_eval: int | None
    seeds: tuple[int, ...]
    learning_rate: float | None
    global_batch_size: int | None
    launcher: tuple[str, ...]
    flash_attn: bool
    work_dir: Path

    @property
    def changes(self) -> dict[str, Any]:
        """The keys that the variant has otherwise than the recipe; empty where there is no variant."""
        changes = {"learning_rate": self.learning_rate, "global_batch_size": self.global_batch_size}
        return {key: value for key, value in changes.items() if value is not None}

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks: those of the data sets."""
        return names_of(parse_datasets(self.benchmark_text))

    @property
    def benchmark_text(self) -> str:
        """The benchmarks as `--benchmark` takes them."""
        return dataset_text(parse_datasets(self.dataset))

    def fixed(self) -> dict[str, Any]:
        """What has to stay the same while a benchmark is continued; the weights of the base are part of it."""
        base = find_base(self.base_model, flash_attn=self.flash_attn)
        return {
            "base": identity_of(base, None),
            "dataset": self.dataset,
            "max_train": self.max_train,
            "max_eval": self.max_eval,
        }


@dataclass(frozen=True)
class Arm:
    """One row of the tables: a training that is repeated with several seeds.

    Attributes:
        kind: "recipe", "first_only" (trained on the first data set alone) or "ablation".
        recipe: key of RECIPES.
        variant: "as is", or what was changed.
        overrides: the keys that were changed.
        dataset: what it is trained on.
    """

    kind: str
    recipe: str
    variant: str
    overrides: dict[str, Any]
    dataset: str

    def folder(self, work_dir: Path, seed: int) -> Path:
        """Where the run of a seed lies."""
        name = re.sub(r"[^\w.,=-]+", "_", f"{self.kind}-{self.recipe}-{self.variant}")
        return work_dir / "runs" / name / f"seed-{seed}"

    def is_compared_with(self, other: Arm) -> bool:
        """Whether this row's second comparison is with `other`, where that comes before it and is the nearest such.

        A recipe is compared with the one before it, both as they are or both changed; the training on the first data
        set alone with the same recipe on all; a changed value with the reference.
        """
        if self.kind == "ablation":
            return other.variant == REFERENCE
        same_recipe = self.kind == "recipe" or other.recipe == self.recipe
        return other.kind == "recipe" and other.variant == self.variant and same_recipe

    def values(self) -> dict[str, Any]:
        """The recipe with what was changed, resolved."""
        changes: dict[str, object] = {**LORA, **self.overrides}
        return read_recipe(ROOT / RECIPES[self.recipe], changes).recipe.to_dict()


def label(overrides: dict[str, Any]) -> str:
    """What was changed, in words."""
    return (
        ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in overrides.items()
        )
        or AS_IS
    )


def recipe_arms(settings: Settings) -> list[Arm]:
    """All five recipes, as they are and changed to the model's size; with several data sets also the first one alone.

    That is trained as the last variant only: as they are, the recipes move a small model too little to forget.
    """
    variants: list[dict[str, Any]] = [{}, *([settings.changes] if settings.changes else [])]
    arms = [Arm("recipe", name, label(changed), changed, settings.dataset) for changed in variants for name in RECIPES]
    first, *others = settings.dataset.split(",")
    if others:
        changed = variants[-1]
        arms.append(Arm("first_only", FORGETTING_RECIPE, label(changed), changed, first))
    return arms


def ablation_arms(settings: Settings) -> list[Arm]:
    """The best recipe, and the best recipe with one value changed."""
    reference = Arm("ablation", "best", REFERENCE, settings.changes, settings.dataset)
    rate = reference.values()["learning_rate"]
    rates = [{"learning_rate": float(f"{factor * rate:.3g}")} for factor in LEARNING_RATE_FACTORS]
    return [reference] + [
        Arm("ablation", "best", label(changed), settings.changes | changed, settings.dataset)
        for changed in (*rates, *ABLATIONS)
    ]


def shared_arguments(settings: Settings) -> list[str]:
    """Flags of training and evaluation alike."""
    flash = ["--flash_attn"] if settings.flash_attn else []
    cache = ["--cache_dir", str(settings.work_dir / "cache")]
    return ["--base_model", settings.base_model, *cache, *flash]


def train_command(settings: Settings, arm: Arm, seed: int) -> list[str]:
    """The command line of one training; `--resume` begins anew where there is nothing to resume."""
    # The smoke test brings limits of its own: it trains on fewer questions, and is evaluated on as many as the others.
    own = arm.values()["max_train"]
    train = min(own, settings.max_train) if own and settings.max_train else own or settings.max_train
    changes = {**LORA, **arm.overrides, "max_train": train, "max_eval": settings.max_eval, "seed": seed}
    flags = [word for key, value in changes.items() for word in (f"--{key}", "null" if value is None else str(value))]
    return [
        *settings.launcher,
        "train",
        "--sft_config",
        RECIPES[arm.recipe],
        *shared_arguments(settings),
        "--dataset",
        arm.dataset,
        "--eval_benchmarks",
        settings.benchmark_text,
        "--output_dir",
        str(arm.folder(settings.work_dir, seed)),
        "--resume",
        *flags,
    ]


def base_command(settings: Settings) -> list[str]:
    """The command line that evaluates the base."""
    limit = ["--limit", str(settings.max_eval)] if settings.max_eval is not None else []
    return [
        *settings.launcher,
        "eval",
        *shared_arguments(settings),
        "--benchmark",
        settings.benchmark_text,
        "--output_dir",
        str(base_folder(settings)),
        *limit,
    ]


def base_folder(settings: Settings) -> Path:
    """Where the base's answers lie."""
    return settings.work_dir / "base"


def finished(folder: Path) -> bool:
    """Whether a run or an evaluation has come to its end."""
    path = folder / artifacts.RUN
    return path.is_file() and artifacts.read_json(path)["status"] == "finished"


def claim(settings: Settings) -> None:
    """Make sure that the runs in the work folder belong to this benchmark.

    Raises:
        RunError: they were made with other settings or another base.
    """
    path, wanted = settings.work_dir / "settings.json", settings.fixed()
    if not path.is_file():
        artifacts.write_json(path, wanted)
        return
    have = artifacts.read_json(path)
    changed = [key for key in wanted if have.get(key) != wanted[key]]
    if changed:
        raise RunError(
            f"--work_dir {settings.work_dir} holds runs with another {', '.join(changed)}",
            "choose another --work_dir, or remove this one",
        )


def missing(settings: Settings, arms: Sequence[Arm]) -> list[tuple[Arm, int]]:
    """The runs that are still to be done; every row has its first seed before any has its second."""
    cells = itertools.product(settings.seeds, arms)
    return [(arm, seed) for seed, arm in cells if not finished(arm.folder(settings.work_dir, seed))]


def run_missing(settings: Settings, arms: Sequence[Arm], at_most: int | None) -> Iterator[tuple[Arm, int]]:
    """Evaluate the base and carry out the missing runs.

    Args:
        settings: of the benchmark.
        arms: its rows.
        at_most: end after so many runs; None for all.

    Yields:
        The row and the seed of each run when it is done.

    Raises:
        RunError: a command failed; its output is in the file that the error names.
    """
    if not finished(base_folder(settings)):
        execute(base_command(settings), settings.work_dir / "base.log")
    for arm, seed in missing(settings, arms)[:at_most]:
        folder = arm.folder(settings.work_dir, seed)
        interrupted = (folder / artifacts.RUN).is_file()
        before = artifacts.read_json(folder / NOTES)["interruptions"] if (folder / NOTES).is_file() else 0
        artifacts.write_json(folder / NOTES, {"interruptions": before + interrupted})
        lend_base(settings, folder)
        execute(train_command(settings, arm, seed), folder.with_suffix(".log"))
        yield arm, seed


def lend_base(settings: Settings, folder: Path) -> None:
    """Put the base's answers where a run looks for them: it goes on from answers that are there."""
    target = folder / artifacts.EVALUATION_FOLDER / "base"
    for name in settings.benchmarks:
        shutil.copytree(base_folder(settings) / name, target / name, dirs_exist_ok=True)


def execute(command: list[str], log: Path) -> None:
    """Run a command line in the repository.

    Raises:
        RunError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RunError(f"{' '.join(command)} ended with {done.returncode}:\n" + "\n".join(lines[-8:]), f"see {log}")


def default_launcher() -> tuple[str, ...]:
    """This Python, without a launcher."""
    return sys.executable, "-m", "vlm_sft"

"""The keys of a recipe, each with its meaning, unit, range and choices.

The command-line flags, the checks and the tables of the guides are all made from this one table.
"""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass, field, fields
from typing import Any

from vlm_sft.common.options import is_function
from vlm_sft.recipe.metric_names import EVALUATION_METRICS, OWN_FUNCTION, SET_LOSS, is_loss


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers.

    Attributes:
        low, high: the ends; None leaves that side open.
        low_open, high_open: True where the end itself is not allowed.
        also: single values that are allowed outside the interval.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    also: tuple[int, ...] = ()

    def contains(self, value: float) -> bool:
        """Tell whether `value` is allowed."""
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return (above and below) or value in self.also

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if self.high is not None:
            # Whole ends are written out: a seed's limit has to be exact.
            end = str(self.high) if isinstance(self.high, int) else f"{self.high:g}"
            parts.append(f"{'below' if self.high_open else 'at most'} {end}")
        return " and ".join(parts) + "".join(f", or {value}" for value in self.also)


def _key(default: Any, help: str, unit: str = "", range: Range | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Declare one key of the recipe."""
    return field(default=default, metadata={"help": help, "unit": unit, "range": range, "choices": choices})


FRACTION = Range(0, 1, high_open=True)
COUNT = Range(1)
RATE = Range(0, 1.0, low_open=True)
RANK = Range(1, 4096)
STRATEGIES = ("steps", "epoch", "no")
PARTS = ("language", "projector", "vision", "projector_lora", "vision_lora", "all")  # of a model, to be trained
AUTO = ("auto",)
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # optimizers of that package
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", *BITSANDBYTES)
FLOORED_SCHEDULERS = ("cosine_with_min_lr", "warmup_stable_decay")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", *FLOORED_SCHEDULERS)
LOSSES = ("nll", "dft")
DECAYS = ("1-sqrt", "linear", "cosine")
TRACKERS = (
    "none",
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "comet_ml",
    "swanlab",
    "clearml",
    "dvclive",
    "codecarbon",
    "azure_ml",
    "dagshub",
    "flyte",
    "neptune",
    "kubeflow",
)


@dataclass(frozen=True)
class Recipe:
    """Every setting of one fine-tuning run, complete and checked; made by `vlm_sft.recipe.load.load_recipe`.

    The defaults are those of configs/sft_config.json. `KEYS` describes each field.
    """

    num_train_epochs: float = _key(2.0, "passes over the training set", "epochs", Range(0, 100_000, low_open=True))
    max_steps: int = _key(
        -1,
        "ends the training after this many optimizer steps; -1 leaves it to num_train_epochs",
        "optimizer steps",
        Range(1, also=(-1,)),
    )
    learning_rate: float = _key(1e-4, "highest learning rate", "per optimizer step", RATE)
    vision_learning_rate: float | None = _key(
        None, "highest learning rate of the vision tower; null: learning_rate", "per optimizer step", RATE
    )
    projector_learning_rate: float | None = _key(
        None, "highest learning rate of the projector; null: learning_rate", "per optimizer step", RATE
    )
    lr_scheduler_type: str = _key("linear", "course of the learning rate after the warmup", choices=SCHEDULERS)
    warmup_ratio: float = _key(
        0.03,
        "part of all optimizer steps in which the learning rate rises; half of them at most",
        "fraction of the steps",
        FRACTION,
    )
    warmup_steps: int = _key(
        0, "the same as a number of steps; above 0 it replaces warmup_ratio", "optimizer steps", Range(0)
    )
    min_lr_ratio: float = _key(
        0.1, "where cosine_with_min_lr and warmup_stable_decay end", "fraction of learning_rate", Range(0, 1)
    )
    lr_decay_ratio: float = _key(
        0.1,
        "part of all optimizer steps in which warmup_stable_decay falls, at the end",
        "fraction of the steps",
        Range(0, 1, low_open=True),
    )
    lr_decay_type: str = _key("1-sqrt", "how warmup_stable_decay falls", choices=DECAYS)
    loss_type: str = _key(
        "nll",
        "what training makes small: the answer tokens' cross entropy, or the same weighted with their probability",
        choices=LOSSES,
    )
    label_smoothing_factor: float = _key(
        0.0,
        "part of every answer token's probability that training spreads evenly over the vocabulary",
        "probability",
        FRACTION,
    )
    neftune_noise_alpha: float = _key(
        0.0,
        "noise on the embeddings of text tokens in training, as large as this over the root of their number and width",
        "",
        Range(0),
    )
    weight_decay: float = _key(0.0, "decoupled weight decay", "per step and learning rate", Range(0, 1.0))
    max_grad_norm: float = _key(0.3, "the gradient is scaled down to this norm; 0 leaves it alone", "L2 norm", Range(0))
    optim: str = _key("adamw_torch_fused", "optimizer", choices=OPTIMIZERS)
    adam_beta1: float = _key(0.9, "decay of the mean of the gradients", "per step", FRACTION)
    adam_beta2: float = _key(0.999, "decay of the mean of the squared gradients", "per step", FRACTION)
    adam_epsilon: float = _key(
        1e-8, "keeps the division by the root of the squared gradients finite", "", Range(0, 1.0, low_open=True)
    )
    bf16: bool | str = _key("auto", "compute in bfloat16; auto: where the device has it", choices=AUTO)
    gradient_checkpointing: bool | str = _key(
        "auto",
        "compute activations again in the backward pass to save memory; auto: where memory needs it",
        choices=AUTO,
    )
    eval_strategy: str = _key("steps", "when to evaluate during training", choices=STRATEGIES)
    eval_steps: int = _key(500, "steps between evaluations (eval_strategy steps)", "optimizer steps", COUNT)
    save_strategy: str = _key("steps", "when to write a checkpoint", choices=STRATEGIES)
    save_steps: int = _key(1000, "steps between checkpoints (save_strategy steps)", "optimizer steps", COUNT)
    save_total_limit: int | None = _key(
        None, "number of checkpoints kept, the best one included; null keeps all", "checkpoints", COUNT
    )
    logging_steps: int = _key(10, "steps between lines of metrics", "optimizer steps", COUNT)
    load_best_model_at_end: bool = _key(False, "end with the checkpoint of the best evaluation instead of the last one")
    metric_for_best_model: str = _key(
        "eval_loss",
        "what says which checkpoint is best: the evaluation loss, that of the data set NAME alone, or a benchmark's "
        "metric (for own data that of --metric) on questions that are answered at each evaluation",
        choices=(*EVALUATION_METRICS, SET_LOSS, OWN_FUNCTION),
    )
    greater_is_better: bool | None = _key(
        None, "whether more of that metric is better; null: no for a loss, yes for any other"
    )
    early_stopping_patience: int | None = _key(
        None,
        "end training after this many evaluations in a row without a better metric_for_best_model; null: never",
        "evaluations",
        COUNT,
    )
    early_stopping_threshold: float = _key(
        0.0, "a metric is better only if it gains more than this (early_stopping_patience)", "of the metric", Range(0)
    )
    dataloader_num_workers: int | str = _key(
        0,
        "processes that prepare batches; 0: the training process itself; auto, and on a GPU a 0 that is no flag: "
        "what the device needs",
        "processes per device",
        Range(0, 256),
        AUTO,
    )
    seed: int = _key(42, "seed of the data order, the adapter's first weights and dropout", "", Range(0, 2**32 - 1))
    global_batch_size: int | None = _key(
        64,
        "questions per optimizer step whatever the number of devices; null: per_device_train_batch_size x "
        "gradient_accumulation_steps x devices",
        "question-answer pairs",
        COUNT,
    )
    max_questions_per_image: int | None = _key(
        None,
        "maximum number of questions about one image in an optimizer step; null: no cap",
        "question-answer pairs",
        COUNT,
    )
    per_device_train_batch_size: int | None = _key(
        None,
        "questions per device and forward pass; null: as many as fit into tokens_per_pack",
        "question-answer pairs",
        COUNT,
    )
    gradient_accumulation_steps: int | None = _key(
        None, "forward passes per optimizer step; null: derived from the global batch", "forward passes", COUNT
    )
    tokens_per_pack: int | None = _key(
        None, "token budget of one forward pass; null: chosen from the device", "tokens", COUNT
    )
    max_train: int | None = _key(
        None, "maximum number of training questions, drawn with the seed; null: all", "question-answer pairs", COUNT
    )
    max_eval: int | None = _key(
        None, "maximum number of evaluation questions, drawn with the seed; null: all", "question-answer pairs", COUNT
    )
    max_length: int | None = _key(
        None,
        "tokens of one sample: images, conversation and answer; null: what the model's positions reach",
        "tokens",
        COUNT,
    )
    oversized: str = _key(
        "keep",
        "longer samples are kept, left out, or their images are scaled down until they fit",
        choices=("keep", "leave_out", "scale"),
    )
    report_to: tuple[str, ...] = _key(
        ("tensorboard",), "destinations of the metrics besides metrics.jsonl", choices=TRACKERS
    )
    lora_r: int = _key(16, "rank of the LoRA matrices", "dimensions", RANK)
    vision_lora_rank: int | None = _key(
        None, "rank of LoRA on the vision tower (train vision_lora); null: lora_r", "dimensions", RANK
    )
    projector_lora_rank: int | None = _key(
        None, "rank of LoRA on the projector (train projector_lora); null: lora_r", "dimensions", RANK
    )
    lora_alpha: int = _key(32, "LoRA's update is scaled by lora_alpha / lora_r", "", COUNT)
    lora_dropout: float = _key(0.05, "dropout on the input of the LoRA matrices", "probability", FRACTION)
    target_modules: tuple[str, ...] = _key(("q_proj", "v_proj", "o_proj"), "layers of the language model that get LoRA")
    train: tuple[str, ...] = _key(
        ("language",),
        "parts to train: LoRA on the language model, projector and vision tower in full or with LoRA, or all weights",
        choices=PARTS,
    )
    use_rslora: bool = _key(False, "scale LoRA's update by lora_alpha / sqrt(lora_r) instead of lora_alpha / lora_r")
    use_dora: bool = _key(False, "train the length of every weight column apart from its direction (DoRA)")
    load_in_4bit: bool = _key(False, "hold the frozen language model in 4 bits (QLoRA; needs bitsandbytes)")
    max_pixels: int | None = _key(
        None, "larger images are scaled down to this area; null: the base model's own limit", "pixels", Range(256)
    )
    min_pixels: int | None = _key(
        None, "smaller images are scaled up to this area; null: the base model's own limit", "pixels", COUNT
    )

    @property
    def best_is_greatest(self) -> bool:
        """Whether the best checkpoint has the greatest value of `metric_for_best_model`, null resolved."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not is_loss(self.metric_for_best_model)

    @property
    def best_metric_column(self) -> str:
        """The name under which an evaluation logs `metric_for_best_model`."""
        name = self.metric_for_best_model
        return name if name.startswith("eval_") else f"eval_{name}"

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value as JSON holds it, in the order of the schema."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_KINDS: dict[Any, str] = {
    float: "number",
    int: "whole number",
    int | str: "auto number",
    bool: "switch",
    bool | str: "auto switch",
    str: "text",
    tuple[str, ...]: "names",
}
_METAVARS = {
    "number": "NUMBER",
    "whole number": "N",
    "auto number": "auto|N",
    "switch": "true|false",
    "auto switch": "auto|true|false",
    "text": "NAME",
    "names": "NAMES",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the recipe, described for checks, flags and guides.

    Attributes:
        name: the key in a file; the flag is "--" and the name.
        kind: "number", "whole number", "auto number" (a whole one), "switch", "auto switch", "text" or "names".
        optional: whether null is a value.
        default: the value of a key that is not given.
        help: what it does, in one sentence.
        unit: unit of the number; "" where it has none.
        range: allowed numbers; None where all are.
        choices: allowed texts; empty where all are.
    """

    name: str
    kind: str
    optional: bool
    default: Any
    help: str
    unit: str
    range: Range | None
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        """The key on the command line."""
        return f"--{self.name}"

    @property
    def metavar(self) -> str:
        """A short sign for the value in a usage line."""
        if self.kind == "text" and self.choices and len(self.choices) <= 4:
            return "|".join(self.choices)
        return _METAVARS[self.kind]

    @property
    def allowed(self) -> str:
        """What the value may be, as the end of a sentence."""
        choices = ", ".join(f'"{choice}"' for choice in self.choices)
        text = {
            "number": "a number",
            "whole number": "a whole number",
            "auto number": '"auto" or a whole number',
            "switch": "true or false",
            "auto switch": '"auto", true or false',
            "text": f"one of {choices}" if len(self.choices) > 1 else choices or "a text",
            "names": "a list of names or one text with commas" + (f", of {choices}" if choices else ""),
        }[self.kind]
        if self.range is not None:
            text += f" {self.range}"
        return text + (", or null" if self.optional else "")

    def is_choice(self, text: str) -> bool:
        """Whether a text is one of the choices; one that ends in NAME is any text with that beginning.

        That of a function of the user's is any module and function.
        """
        if OWN_FUNCTION in self.choices and is_function(text):
            return True
        stems = [choice.removesuffix("NAME") for choice in self.choices if choice.endswith("_NAME")]
        return text in self.choices or any(text.startswith(stem) and text != stem for stem in stems)

    @property
    def default_text(self) -> str:
        """The default as a flag would give it."""
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


def _describe() -> dict[str, Key]:
    hints = typing.get_type_hints(Recipe)
    table = {}
    for item in fields(Recipe):
        hint = hints[item.name]
        optional = type(None) in typing.get_args(hint)
        if optional:
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        table[item.name] = Key(item.name, _KINDS[hint], optional, item.default, **item.metadata)
    return table


KEYS: dict[str, Key] = _describe()

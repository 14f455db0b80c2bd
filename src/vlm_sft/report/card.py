"""The model card of a run, a checkpoint or an export, from the run's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import in_markdown
from vlm_sft.report.collect import collect_runs
from vlm_sft.report.facts import forecast_rows
from vlm_sft.report.markdown import results_table

POCKET = "pocket"
ADAPTER, MERGED, MODEL = "adapter", "merged", "model"
_KINDS = {ADAPTER: "An adapter", MERGED: "A merged model", MODEL: "A model whose weights were all trained,"}
_RELATIONS = {ADAPTER: "adapter", MERGED: "finetune", MODEL: "finetune"}
_TAG = "vlm-sft"  # of every card that is written here
_TOLD_KEYS = (  # of the recipe, besides those that differ from the defaults
    "train",
    "num_train_epochs",
    "learning_rate",
    "global_batch_size",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "seed",
)
_UNKNOWN = "Not recorded: the adapter came without the files of its run."


@dataclass(frozen=True, slots=True)
class About:
    """What a card is about.

    Attributes:
        name: the heading.
        kind: `ADAPTER`, `MERGED` or `MODEL`.
        base: the base model: a Hub id, a folder, or "pocket".
        prompt: what prompt.json says.
        run: folder of the run's files.
        version: of vlm-sft.
        step: of a checkpoint, which no benchmark was asked of; None for the outcome of a run.
        verification: how an export was compared with its adapter; "" for what was not exported.
    """

    name: str
    kind: str
    base: str
    prompt: Mapping[str, Any]
    run: Path
    version: str
    step: int | None = None
    verification: str = ""

    def facts(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; {} where there is none."""
        path = self.run / name
        return artifacts.read_json(path) if path.is_file() else {}

    @property
    def local(self) -> bool:
        """Whether the base is a folder of this machine."""
        return Path(self.base).is_dir()

    @property
    def public_base(self) -> str:
        """The base without the folders of this machine."""
        return Path(self.base).resolve().name if self.local else self.base


def of_folder(folder: Path, run: Path, version: str) -> About | None:
    """What a folder of a run holds; None where it holds no trained weights.

    Args:
        folder: the run's own, or a checkpoint's.
        run: the run's folder.
        version: of vlm-sft.
    """
    config = folder / artifacts.ADAPTER_CONFIG
    full = artifacts.holds_full_model(folder)
    prompt = folder / artifacts.PROMPT
    if not (config.is_file() or full) or not prompt.is_file():
        return None
    recorded = artifacts.read_json(run / artifacts.RUN) if (run / artifacts.RUN).is_file() else {}
    named = artifacts.read_json(config).get("base_model_name_or_path") if config.is_file() else None
    within = re.match(r"checkpoint-(\d+)", folder.name)
    step = int(within[1]) if within else None
    name = run.resolve().name + (f", step {step:,}" if step is not None else "")
    base = str(recorded.get("base_model") or named or "unknown")
    return About(name, MODEL if full else ADAPTER, base, artifacts.read_json(prompt), run, version, step)


def may_write(path: Path) -> bool:
    """Whether a README.md can be replaced: there is none, or it is a card of ours or the empty one of PEFT."""
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"\n- {_TAG}\n" in text or "[More Information Needed]" in text


def card(about: About) -> str:
    """Write the card: front matter of the Hub, use, training, data, results, forecast, verification, limits."""
    sections = [
        _front_matter(about),
        f"# {in_markdown(about.name)}",
        f"{_KINDS[about.kind]} for questions about images, fine-tuned from {_code(about.public_base)} with vlm-sft "
        f"{about.version}.{_where_the_base_is(about)}",
        "## Use",
        _use(about),
        "## Training",
        _training(about),
        "## Data",
        _data(about.facts(artifacts.DATA)),
        "## Results",
        _results(about),
        *_forecast(about),
        *(["## Verification", about.verification] if about.verification else []),
        "## Limits",
        _limits(about),
    ]
    return "\n\n".join(sections) + "\n"


def _where_the_base_is(about: About) -> str:
    """Explain the path in adapter_config.json, which loading needs and which says nothing elsewhere."""
    if not about.local or about.kind != ADAPTER:
        return ""
    return (
        f" The base was a folder of that name on the machine of the training; `{artifacts.ADAPTER_CONFIG}` holds its "
        "place there, so that the adapter opens without being told. Elsewhere pass your own: `--base_model FOLDER`."
    )


def _front_matter(about: About) -> str:
    on_hub = not about.local and re.fullmatch(r"[\w.-]+/[\w.-]+", about.base)
    tags = (_TAG, "visual-question-answering", *(("lora",) if about.kind == ADAPTER else ()))
    lines = [
        "---",
        f"library_name: {'peft' if about.kind == ADAPTER else 'transformers'}",
        "pipeline_tag: image-text-to-text",
        *([f"base_model: {about.base}", f"base_model_relation: {_RELATIONS[about.kind]}"] if on_hub else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def _opened(about: About) -> str:
    """The lines that open the model and its processor."""
    if about.kind != ADAPTER:
        return """folder = "."
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)"""
    base = "str(WEIGHTS)" if about.base == POCKET else json.dumps(about.public_base, ensure_ascii=False)
    return f"""base = {base}
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, ".")
processor = AutoProcessor.from_pretrained(base)"""


def _use(about: About) -> str:
    prompt = about.prompt
    adapter = about.kind == ADAPTER
    bounds = {name: prompt[name] for name in ("min_pixels", "max_pixels") if prompt.get(name) is not None}
    note = f"\n\nImages were bounded in training: {_listed(bounds)} (area in pixels)." if bounds and adapter else ""
    template = prompt.get("own_template") or prompt["template"]
    said = {"role": "system", "content": [{"type": "text", "text": prompt["system"]}]}
    system = f"{said!r}, " if prompt["system"] else ""
    extra = "from peft import PeftModel\n" if adapter else ""
    pocket = "from vlm_sft.model.pocket import WEIGHTS\n" if adapter and about.base == POCKET else ""
    return f"""```python
{extra}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{pocket}
{_opened(about)}
question = {template!r}.replace("{{question}}", "What is the highest value?")
messages = [{system}{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": question}}]}}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=[text], images=[[Image.open("chart.png").convert("RGB")]], return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens={prompt["max_new_tokens"]})
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The prompt is the one of the training (`{artifacts.PROMPT}`); another one is answered less well.{note}"""


def _training(about: About) -> str:
    recipe, run = about.facts(artifacts.RECIPE), about.facts(artifacts.RUN)
    if not recipe:
        return _UNKNOWN
    rows = [(key, recipe[key]) for key in _TOLD_KEYS if key in recipe]
    rows += [
        (key, run[key])
        for key in ("steps", "questions_seen", "device", "world_size", "parallel", "dtype", "wall_seconds")
        if run.get(key) is not None
    ]
    if about.step is not None:
        rows.append(("step of this checkpoint", about.step))
    trained = (run.get("lora") or {}).get("trainable_parameters")
    if trained:
        rows.append(("trained parameters", f"{trained:,}"))
    return _table(("setting", "value"), [(key, _shown(value)) for key, value in rows])


def _data(data: Mapping[str, Any]) -> str:
    if "train" not in data:
        return _UNKNOWN
    part = data["train"]
    lines = [f"Trained on {part['samples']:,} questions on {part['images']:,} images: {_listed(part['by_dataset'])}."]
    if part.get("synthetic"):
        lines.append(f"Drawn by a generator: {', '.join(part['synthetic'])}.")
    if data.get("left_out"):
        lines.append(f"Left out: {_listed(data['left_out'])}.")
    return " ".join(lines)


def _results(about: About) -> str:
    if about.step is not None:
        return "Not measured: this is a checkpoint within a training."
    results = about.facts(artifacts.RESULTS)
    if not results.get("benchmarks"):
        return "Not measured."
    verdicts = [
        f"- {in_markdown(name)}: {row['verdict']}" for name, row in results["benchmarks"].items() if row.get("verdict")
    ]
    return "\n\n".join(
        [
            "Percent with 95 % intervals; the difference is paired, on the same questions, in points.",
            results_table(results),
            *verdicts,
        ]
    )


def _forecast(about: About) -> list[str]:
    """What was forecast and what came of it; nothing where there was no forecast."""
    if about.step is not None or not (about.run / artifacts.RUN).is_file():
        return []
    rows = [row for report in collect_runs([about.run]) for row in forecast_rows(report)]
    if not rows:
        return []
    return ["## Forecast", _table(("quantity", "forecast", "range", "measured", "error", "range held"), rows)]


def _limits(about: About) -> str:
    results = about.facts(artifacts.RESULTS).get("benchmarks", {}) if about.step is None else {}
    lines = [
        f"- Answers of at most {about.prompt['max_new_tokens']} tokens to questions about images; other uses were not "
        "measured."
    ]
    synthetic = [name for name, row in results.items() if row.get("synthetic")]
    if synthetic:
        lines.append(f"- {', '.join(synthetic)}: drawn by a generator; such numbers say nothing about real images.")
    if not results:
        lines.append("- No benchmark was measured in the run that made it.")
    lines += [
        f"- {in_markdown(name)}: differences below {100 * row['smallest_detectable_difference']:.1f} points cannot be "
        f"told from chance with {row['n']:,} questions."
        for name, row in results.items()
        if row.get("smallest_detectable_difference") is not None
    ]
    lines.append("- The licences of the base model and of the data apply.")
    return "\n".join(lines)


def _listed(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{in_markdown(name)} {_shown(value)}" for name, value in counts.items())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _code(text: str) -> str:
    """A name as code, whose own backticks do not end it."""
    return f"`{' '.join(text.split()).replace('`', chr(0x2019))}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(in_markdown(cell) for cell in line) + " |" for line in lines)

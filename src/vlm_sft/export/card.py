"""The model card of an export, from the run's own files. Imports report, artifacts and this room's source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_sft import artifacts
from vlm_sft.export.source import Source
from vlm_sft.report.collect import collect_runs
from vlm_sft.report.facts import forecast_rows
from vlm_sft.report.markdown import results_table

_TOLD_KEYS = (  # of the recipe, besides those that differ from the defaults
    "train", "num_train_epochs", "learning_rate", "global_batch_size", "lora_r", "lora_alpha", "lora_dropout",
    "target_modules", "seed",
)
_UNKNOWN = "Not recorded: the adapter came without the files of its run."


def card(source: Source, report: Mapping[str, Any]) -> str:
    """Write the card: front matter of the Hub, use, training, data, results, forecast, verification, limits.

    Args:
        source: what was exported.
        report: what export.json says.
    """
    merged = report["kind"] == "merged"
    name = report["name"]
    sections = [
        _front_matter(source, merged),
        f"# {name}",
        f"{'A merged model' if merged else 'An adapter'} for questions about images, fine-tuned from "
        f"`{_public_name(source)}` with vlm-sft {report['versions']['vlm-sft']}.",
        "## Use",
        _use(source, merged),
        "## Training",
        _training(source),
        "## Data",
        _data(source.facts(artifacts.DATA)),
        "## Results",
        _results(source.facts(artifacts.RESULTS)),
        *_forecast(source.run),
        "## Verification",
        _verification(report),
        "## Limits",
        _limits(source),
    ]
    return "\n\n".join(sections) + "\n"


def _public_name(source: Source) -> str:
    """The base without the folders of this machine."""
    return Path(source.base.name).name if Path(source.base.name).is_dir() else source.base.name


def _is_hub_id(source: Source) -> bool:
    return source.base.path == source.base.name and not Path(source.base.path).is_dir()


def _front_matter(source: Source, merged: bool) -> str:
    lines = [
        "---",
        f"library_name: {'transformers' if merged else 'peft'}",
        "pipeline_tag: image-text-to-text",
        *([f"base_model: {source.base.name}", f"base_model_relation: {'finetune' if merged else 'adapter'}"]
          if _is_hub_id(source) else []),
        "tags:",
        *(f"- {tag}" for tag in ("vlm-sft", "visual-question-answering", *(() if merged else ("lora",)))),
        "---",
    ]  # fmt: skip
    return "\n".join(lines)


def _use(source: Source, merged: bool) -> str:
    opened = 'model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")'
    extra = ""
    processor = "folder"
    if not merged:
        opened = (
            f'base = AutoModelForImageTextToText.from_pretrained("{_public_name(source)}", dtype="auto")\n'
            "model = PeftModel.from_pretrained(base, folder)"
        )
        extra, processor = "from peft import PeftModel\n", f'"{_public_name(source)}"'
    prompt = source.base.prompt
    asked = {"min_pixels": prompt.min_pixels, "max_pixels": prompt.max_pixels}
    bounds = {name: value for name, value in asked.items() if value is not None}
    note = f"\n\nImages were bounded in training: {_listed(bounds)} (area in pixels)." if bounds and not merged else ""
    return f"""```python
{extra}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."
{opened}
processor = AutoProcessor.from_pretrained({processor})
question = {prompt.template!r}.replace("{{question}}", "What is the highest value?")
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": question}}]}}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=[text], images=[[Image.open("chart.png").convert("RGB")]], return_tensors="pt")
answer = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

The prompt is the one of the training (`prompt.json`); another one is answered less well.{note}"""


def _training(source: Source) -> str:
    recipe = source.facts(artifacts.RECIPE)
    run = source.facts(artifacts.RUN)
    if not recipe:
        return _UNKNOWN
    rows = [(key, recipe[key]) for key in _TOLD_KEYS if key in recipe]
    rows += [
        (key, run[key])
        for key in ("steps", "questions_seen", "device", "world_size", "parallel", "dtype", "wall_seconds")
        if run.get(key) is not None
    ]
    trained = (run.get("lora") or {}).get("trainable_parameters")
    if trained:
        rows.append(("trained parameters", f"{trained:,}"))
    return _table(("setting", "value"), [(key, _shown(value)) for key, value in rows])


def _data(data: Mapping[str, Any]) -> str:
    if "train" not in data:
        return _UNKNOWN
    part = data["train"]
    lines = [
        f"Trained on {part['samples']:,} questions on {part['images']:,} images: {_listed(part['by_dataset'])}.",
    ]
    if part.get("synthetic"):
        lines.append(f"Drawn by a generator: {', '.join(part['synthetic'])}.")
    if data.get("left_out"):
        lines.append(f"Left out: {_listed(data['left_out'])}.")
    return " ".join(lines)


def _results(results: Mapping[str, Any]) -> str:
    if not results.get("benchmarks"):
        return "Not measured."
    verdicts = [
        f"- {name}: {row['verdict']}" for name, row in results["benchmarks"].items() if row.get("verdict")
    ]
    table = results_table(dict(results))
    return "\n\n".join([
        "Percent with 95 % intervals; the difference is paired, on the same questions, in points.", table, *verdicts
    ])


def _forecast(run: Path) -> list[str]:
    """What was forecast and what came of it; nothing where there was no forecast."""
    if not (run / artifacts.RUN).is_file():
        return []
    rows = [row for report in collect_runs([run]) for row in forecast_rows(report)]
    if not rows:
        return []
    return ["## Forecast", _table(("quantity", "forecast", "range", "measured", "error", "range held"), rows)]


def _verification(report: Mapping[str, Any]) -> str:
    check = report["verification"]
    return (
        f"This folder was opened with plain transformers and compared with the adapter it was made from: "
        f"{check['identical_answers']} of {check['questions']} greedy answers are the same "
        f"({check['near_ties']} differ by a tie within rounding), logits differ by "
        f"{check['largest_difference']:.2g} of their spread, and the adapter changes them by {check['effect']:.2g}; "
        f"asked on {check['source']}. Details: `{artifacts.EXPORT}`."
    )


def _limits(source: Source) -> str:
    results = source.facts(artifacts.RESULTS).get("benchmarks", {})
    lines = ["- Short answers to questions about one image; other uses were not measured."]
    synthetic = [name for name, row in results.items() if row.get("synthetic")]
    if synthetic:
        lines.append(f"- {', '.join(synthetic)}: drawn by a generator; such numbers say nothing about real images.")
    if not results:
        lines.append("- No benchmark was measured in the run that made it.")
    lines += [
        f"- {name}: differences below {100 * row['smallest_detectable_difference']:.1f} points cannot be told from "
        f"chance with {row['n']:,} questions."
        for name, row in results.items()
        if row.get("smallest_detectable_difference") is not None
    ]
    lines.append("- The licences of the base model and of the data apply.")
    return "\n".join(lines)


def _listed(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in counts.items())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

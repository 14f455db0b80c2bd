"""Tables and figures of the recipe guides, made from the recorded results and the recipe schema alone.

`documents()` gives the texts as they have to be; a test compares them with the files in docs/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit, device_of, marks, with_block
from recipe_figures import draw, figure_data, shown_data
from recipe_runs import RECIPES, REFERENCE
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.common.formats import count, duration, percent, percent_interval, points, points_interval, size
from vlm_sft.recipe.schema import KEYS, Key

DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
COMPARISON = DOCS / "CONFIGS_COMPARISON.md"
GUIDE = DOCS / "HYPERPARAMETER_GUIDE.md"
BEST = DOCS / "BEST_CONFIG_EXPLAINED.md"
README = ROOT / "README.md"
# What a reader of the README chooses a recipe for, and the record that it shows gain and cost from.
USES = {
    "smoketest": "a check that everything works",
    "1epoch": "a first result",
    "2epoch": "the default",
    "5epoch": "quality; keeps the best checkpoint",
    "best": "the best we know",
}
SHOWN = RESULTS / "recipes-pocket-easy_vqa.json"
NOT_RUN = "not run"
FACT = "Default "  # how the generated line under a key's heading begins
# Of the base model, from the Qwen2.5-VL technical report (Bai et al. 2025); accuracies of tuned models have to be run.
PUBLISHED = {
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "chartqa": "87.3 % (relaxed accuracy, test)",
        "textvqa": "84.9 % (VQA accuracy, validation)",
    }
}
Result = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table; the columns in `numbers` are set to the right."""
    rule = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def results(kind: str) -> dict[Path, Result]:
    """The result files of a kind by their path, pocket's first."""
    paths = sorted(RESULTS.glob(f"{kind}-*.json"), key=lambda path: ("-pocket-" not in path.name, path.name))
    return {path: artifacts.read_json(path) for path in paths}


def parameters() -> str:
    """The keys in which the recipes differ, or that all of them set."""
    recipes = {name: artifacts.read_json(ROOT / file) for name, file in RECIPES.items()}
    rows = []
    for key in dict.fromkeys(key for values in recipes.values() for key in values):
        shown = [_value(values.get(key, KEYS[key].default)) for values in recipes.values()]
        rows.append([f"`{key}`", *(shown if len(set(shown)) > 1 else [shown[0], *[""] * (len(shown) - 1)])])
    rows.sort(key=lambda row: not all(row))  # what differs comes first
    head = ["key", *(f"[{name}](../{file})" for name, file in RECIPES.items())]
    return table(head, rows) + "\n\nA row with one value: all five recipes have it."


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str) else json.dumps(value)


def short_title(result: Result) -> str:
    """Model and data of a result file."""
    return f"**{result['settings']['base_model']}** on `{result['settings']['dataset']}`:"


def measured_on(result: Result) -> str:
    """What a table was measured on, in one paragraph."""
    asked = result["settings"]
    limits = [
        f"{name} {count(asked[key])} questions" if asked[key] else f"{name} all questions"
        for name, key in (("training on", "max_train"), ("evaluation on", "max_eval"))
    ]
    devices = dict.fromkeys(device_of(row) for row in result["rows"] if row["seeds"])
    lora = asked["lora"]
    note = f" Note: {result['note'].rstrip('.')}." if result.get("note") else ""
    return (
        f"**{asked['base_model']}** on `{asked['dataset']}`: {', '.join(limits)} a benchmark; LoRA r {lora['r']}, "
        f"alpha {lora['alpha']}, {'/'.join(lora['target_modules'])}; seeds asked for: "
        f"{', '.join(map(str, asked['seeds']))}. Measured on {', '.join(devices) or 'nothing yet'}, commit "
        f"{commit(result)}, {result['made'][:10]}.{note}"
    )


def benchmark_table(result: Result, name: str) -> str:
    """All recipes on one benchmark."""
    base = result["base"]["benchmarks"].get(name)
    note = " (synthetic)" if base and base["synthetic"] else ""
    rows = [["base", "", "", "", "", _score(base), "", ""]] if base else []
    for row in result["rows"]:
        if row["arm"] == "recipe":
            rows.append([row["recipe"], *_trained(row), *_scores(row, name)])
    head = [
        "recipe",
        "variant",
        "epochs",
        "learning rate",
        "seeds",
        "accuracy [95 %]",
        "against base, points",
        "against the recipe before, points",
    ]
    metric = f" `{base['metric']}`, {base['n']:,} questions" if base else ""
    return f"**{name}**{note}{metric}\n\n" + table(head, rows, (2, 3, 4, 5, 6, 7))


def _trained(row: Result) -> list[str]:
    return [row["variant"], f"{row['epochs']:g}", f"{row['learning_rate']:g}", str(len(row["seeds"])) or "0"]


def _score(found: Result | None) -> str:
    return f"{percent(found['accuracy'])} {percent_interval(found['interval'])}" if found else NOT_RUN


def _difference(difference: float, interval: Sequence[float], verdict: str) -> str:
    text = f"{points(difference)} {points_interval((interval[0], interval[1]))}"
    return text if verdict == "no significant difference" else f"{text} {verdict}"


def _scores(row: Result, name: str) -> list[str]:
    """Accuracy and both differences of a row on a benchmark."""
    found = row["benchmarks"].get(name)
    if found is None:
        return [NOT_RUN, "", ""]
    before = found["previous"]
    return [
        _score(found),
        _difference(found["difference"], found["difference_interval"], found["verdict"]),
        _difference(before["difference"], before["interval"], before["verdict"]) if before else "",
    ]


def short_table(result: Result) -> str:
    """What each recipe is for, its gain on the first benchmark, and its cost, at the rate that suits the model."""
    name = result["settings"]["benchmarks"][0]
    rows = {row["recipe"]: row for row in result["rows"] if row["arm"] == "recipe" and name in row["benchmarks"]}
    shown = []
    for recipe, use in USES.items():
        row = rows[recipe]
        found = row["benchmarks"][name]
        gain = f"{points(found['difference'])} {points_interval(tuple(found['difference_interval']))}"
        path = RECIPES[recipe]
        shown.append([f"[`{recipe}`]({path})", f"{row['epochs']:g}", use, gain, duration(row["wall_seconds"])])
    rate = rows["best"]["learning_rate"]
    head = ["recipe", "epochs", "use it for", f"gain on `{name}`, points", "training"]
    return table(head, shown, (1, 3, 4)) + (
        f"\n\nMeasured with {result['settings']['base_model']} on {rows['best']['train_questions']:,} questions "
        f"({rows['smoketest']['train_questions']:,} for smoketest) at a "
        f"learning rate of {rate:g}; means of {len(rows['best']['seeds'])} seeds, {device_of(rows['best'])}."
    )


def cost_table(result: Result) -> str:
    """What the trainings cost."""
    rows = []
    for row in result["rows"]:
        disk = row["disk_bytes"]
        costs = (
            [
                count(row["questions_seen"]),
                count(row["steps"]),
                duration(row["wall_seconds"]),
                duration(row["evaluate_seconds"]),
                size(row["peak_bytes"]),
                *(size(disk[key]) for key in ("adapter", "checkpoints", "logs")),
            ]
            if disk
            else [NOT_RUN, *[""] * 7]
        )
        name = row["recipe"] if row["arm"] == "recipe" else f"{row['recipe']} on `{row['dataset']}` alone"
        rows.append([name, row["variant"], *costs])
    head = [
        "recipe",
        "variant",
        "questions seen",
        "steps",
        "training",
        "evaluation",
        "peak memory",
        "adapter",
        "checkpoints",
        "logs",
    ]
    return table(head, rows, range(2, len(head)))


def forgetting_table(result: Result) -> str:
    """Training on the first data set alone against training on all of them, on every benchmark."""
    alone = [row for row in result["rows"] if row["arm"] == "first_only"]
    rows = []
    for row in alone:
        (mixed,) = (
            other
            for other in result["rows"]
            if other["arm"] == "recipe" and (other["recipe"], other["variant"]) == (row["recipe"], row["variant"])
        )
        for name in result["settings"]["benchmarks"]:
            for which in (row, mixed):
                rows.append([name, f"`{which['dataset']}`", *_trained(which), *_scores(which, name)[:2]])
    head = [
        "benchmark",
        "trained on",
        "variant",
        "epochs",
        "learning rate",
        "seeds",
        "accuracy [95 %]",
        "against base, points",
    ]
    return table(head, rows, (3, 4, 5, 6, 7)) if rows else ""


def real_models() -> str:
    """Models for which only the base's published scores are known, and our runs where there are any."""
    measured = {result["settings"]["base_model"] for result in results("recipes").values()}
    rows = []
    for model, scores in PUBLISHED.items():
        for name, score in scores.items():
            ours = "see above" if model in measured else NOT_RUN
            rows.append([f"`{model}`", name, score, *[ours] * len(RECIPES)])
    return table(["base model", "benchmark", "base, published", *RECIPES], rows)


def measured_sections(
    make: Callable[[Path, Result], str], kind: str = "recipes", title: Callable[[Result], str] = short_title
) -> str:
    """One section for each result file that has something to show."""
    made = [(result, make(path, result)) for path, result in results(kind).items()]
    return "\n\n".join(f"{title(result)}\n\n{text}" for result, text in made if text) or NOT_RUN


def ablation_table(result: Result) -> str:
    """The best recipe with one value changed at a time."""
    names = result["settings"]["benchmarks"]
    common = next(row["overrides"] for row in result["rows"] if row["variant"] == REFERENCE)
    rows = []
    for row in result["rows"]:
        changed = row["variant"]
        if changed == REFERENCE and common:
            changed = f"reference: best with {', '.join(f'{key} {value:g}' for key, value in common.items())}"
        cells = [cell for name in names for cell in (_scores(row, name)[0], _scores(row, name)[2])]
        rows.append([changed, str(len(row["seeds"])), *cells, duration(row["wall_seconds"])])
    head = [
        "changed",
        "seeds",
        *(part for name in names for part in (name, "against the reference, points")),
        "training",
    ]
    return table(head, rows, range(1, len(head)))


def best_values() -> str:
    """The values of the best recipe beside those of the default one."""
    best, default = (artifacts.read_json(ROOT / RECIPES[name]) for name in ("best", "2epoch"))
    rows = [[f"`{key}`", _value(value), _value(default[key])] for key, value in best.items()]
    return table(["key", "best", "2epoch"], rows)


def fact(key: Key) -> str:
    """The generated line under the heading of a key."""
    unit = f"; unit: {key.unit}" if key.unit else ""
    return f"{FACT}`{key.default_text}`{unit}; {key.allowed}. Flag: `{key.flag} {key.metavar}`."


def with_facts(text: str) -> str:
    """The guide with the generated line under each key's heading.

    Raises:
        RunError: a key has no heading, or a heading no key.
    """
    headings = re.findall(r"^### `(\w+)`$", text, flags=re.MULTILINE)
    lost, unknown = [key for key in KEYS if key not in headings], [key for key in headings if key not in KEYS]
    if lost or unknown:
        what = f"without a section: {', '.join(lost) or 'none'}; sections without a key: {', '.join(unknown) or 'none'}"
        raise RunError(f"{GUIDE.name}: keys {what}", "write a section '### `key`' for each key of recipe/schema.py")
    for key in KEYS.values():
        heading = f"### `{key.name}`\n\n"
        before, _, after = text.partition(heading)
        if after.startswith(FACT):
            after = after.partition("\n\n")[2]
        text = f"{before}{heading}{fact(key)}\n\n{after}"
    return text


def fill(text: str, blocks: dict[str, str]) -> str:
    """Put the generated blocks between their marks.

    Raises:
        RunError: a mark is missing.
    """
    for name, body in blocks.items():
        if not all(mark in text for mark in marks(name)):
            raise RunError(f"there are no marks {' and '.join(marks(name))}", "put them into the document")
        text = with_block(text, name, body)
    return text


def figure_path(path: Path) -> Path:
    """The figure of a result file."""
    return FIGURES / f"quality_time-{path.stem.removeprefix('recipes-')}.svg"


def figures() -> dict[Path, dict[str, Any]]:
    """The figures and the numbers that they have to show."""
    return {figure_path(path): figure_data(result) for path, result in results("recipes").items()}


def _figure_link(path: Path, result: Result) -> str:
    place = figure_path(path).relative_to(DOCS)
    return f"![Accuracy over training time, {result['settings']['base_model']}]({place})"


def documents() -> dict[Path, str]:
    """The text of every guide as it has to be: the prose that is there, with tables of the recorded results."""
    benchmarks = measured_sections(
        lambda _, result: "\n\n".join(benchmark_table(result, name) for name in result["settings"]["benchmarks"]),
        title=measured_on,
    )
    return {
        COMPARISON: fill(
            COMPARISON.read_text(encoding="utf-8"),
            {
                "parameters": parameters(),
                "benchmarks": benchmarks,
                "figures": measured_sections(_figure_link),
                "costs": measured_sections(lambda _, result: cost_table(result)),
                "forgetting": measured_sections(lambda _, result: forgetting_table(result)),
                "real models": real_models(),
            },
        ),
        BEST: fill(
            BEST.read_text(encoding="utf-8"),
            {
                "values": best_values(),
                "ablation": measured_sections(lambda _, result: ablation_table(result), "ablation", measured_on),
            },
        ),
        GUIDE: with_facts(GUIDE.read_text(encoding="utf-8")),
        README: fill(README.read_text(encoding="utf-8"), {"recipes": short_table(artifacts.read_json(SHOWN))}),
    }


def write_documents() -> list[Path]:
    """Write the guides and the figures; returns what was written."""
    written = []
    for path, data in figures().items():
        if shown_data(path) != data:
            artifacts.write_text_atomic(path, draw(data))
        written.append(path)
    return written + [artifacts.write_text_atomic(path, text) for path, text in documents().items()]

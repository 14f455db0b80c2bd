"""From measurements to rows, checks and tables of the throughput benchmark. Pure: no torch, no model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

LOSS_TOLERANCE = 1e-3  # relative; the sides resize images and order sums differently
OURS = "ours"
_NARROW = " bf16"  # behind the name of a side that computed in bfloat16 on a CPU


def label_of(side: str, number_format: str) -> str:
    """Name of a side in one number format."""
    return side + (_NARROW if number_format == "bfloat16" else "")


def side_of(label: str) -> str:
    """The side of a label."""
    return label.removesuffix(_NARROW)


def is_narrow(label: str) -> bool:
    """Whether a label is that of a side in bfloat16."""
    return label.endswith(_NARROW)


def fastest(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every side in the number format that trains the most questions a second over all epochs."""
    found: dict[str, dict[str, Any]] = {}
    for label, row in sides.items():
        if side_of(label) not in found or row["long"] > found[side_of(label)]["long"]:
            found[side_of(label)] = row
    return found


def arithmetic_flops(counts: dict[str, int], sizes: dict[str, int]) -> float:
    """FLOPs of a LoRA step's matrix products by parameters and tokens.

    2 FLOPs a parameter and token forward, 2 backward to the inputs, none for the frozen weights; the vision tower
    forward only; the vocabulary projection where it is computed. Attention scores and LoRA itself are left out.

    Args:
        counts: of tokens, patches and rows of the head.
        sizes: parameters of the parts, as `shapes.parameter_counts` has them.
    """
    rows = counts.get("head_rows") or counts.get("supervised", 0)
    language = 4.0 * sizes["language"] * counts.get("language_tokens", 0)
    return language + 4.0 * sizes["embedding"] * rows + 2.0 * sizes["vision"] * counts.get("patches", 0)


def limits(
    expected: dict[str, int], sizes: dict[str, int], epochs: int, flops_by_arithmetic: float, matrix_peak: float
) -> dict[str, float]:
    """Questions/s of a training that shares images and keeps their features, if its FLOPs were all that took time.

    Args:
        expected: the case's work, from `cases.expected_work`.
        sizes: parameters of the model's parts.
        epochs: passes of the long training.
        flops_by_arithmetic: FLOPs that were counted for one of `arithmetic_flops`.
        matrix_peak: FLOPs/s of a matrix product.

    Returns:
        "cold", "long" and "warm".
    """
    shared = {"language_tokens": expected["own_tokens"] + expected["distinct_prefix_tokens"]}
    epoch = arithmetic_flops(shared | {"supervised": expected["supervised"]}, sizes)
    tower = arithmetic_flops({"patches": expected["distinct_patches"]}, sizes)
    rate = matrix_peak / flops_by_arithmetic * expected["questions"]
    return {"cold": rate / (epoch + tower), "long": rate * epochs / (epochs * epoch + tower), "warm": rate / epoch}


def saved_by_arithmetic(expected: dict[str, int], sizes: dict[str, int], epochs: int) -> dict[str, float]:
    """How many times more FLOPs separate sequences need than shared ones: "cold", "long" and "warm"."""
    separate = {"language_tokens": expected["tokens"]} | {name: expected[name] for name in ("supervised", "patches")}
    whole = arithmetic_flops(separate, sizes)
    one = limits(expected, sizes, epochs, 1.0, 1.0)
    return {name: whole * value / expected["questions"] for name, value in one.items()}


def summary(result: dict[str, Any], expected: dict[str, int], sizes: dict[str, int], epochs: int) -> dict[str, Any]:
    """One row of one round.

    Args:
        result: what a worker wrote; seconds.
        expected: the case's work, from `cases.expected_work`.
        sizes: parameters of the model's parts.
        epochs: passes that the total is about; those that were not run are taken to last as long as the measured ones.
    """
    questions, seconds = expected["questions"], result["epoch_seconds"]
    usual = median(seconds[1:] or seconds)
    total = result["preparation_seconds"] + sum(seconds[:epochs]) + usual * max(0, epochs - len(seconds))
    first, last = result["epochs"][0], result["epochs"][-1]
    warm_up = result["warm_up"]
    counted_share = 1.0  # by the arithmetic alone where nothing was counted
    if warm_up["flops"]:
        counted_share = (warm_up["flops"][1] - warm_up["flops"][0]) / arithmetic_flops(warm_up["epochs"][0], sizes)
    flops = [arithmetic_flops(counts, sizes) * counted_share for counts in result["epochs"]]
    padding = _padding(first)
    return {
        "cold": questions / (result["preparation_seconds"] + seconds[0]),
        "warm": questions / usual,
        "long": epochs * questions / total,
        "extrapolated": len(seconds) < epochs,
        "preparation_seconds": result["preparation_seconds"],
        "loading_seconds": result["loading_seconds"],
        "first_epoch_seconds": seconds[0],
        "warm_epoch_seconds": usual,
        "padding_share": padding / first["language_tokens"],
        "data_wait_share": sum(result["data_wait_seconds"]) / sum(seconds),
        "cold_tower_calls": result["preparation"].get("tower_calls", 0) + first.get("tower_calls", 0),
        "cold_tower_images": result["preparation"].get("tower_images", 0) + first.get("tower_images", 0),
        "warm_tower_calls": last.get("tower_calls", 0),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "matrix_peak": result["matrix_peak"],
        "flops_by_arithmetic": counted_share,
        "share_of_peak": sum(flops) / sum(seconds) / result["matrix_peak"],
        "loss": result["epoch_loss"][0],
        "trainable_parameters": result["trainable_parameters"],
        "preparation": result["preparation"],
        "epochs": result["epochs"],
        "versions": result["versions"],
    }


def median_row(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of one side as one row: medians of the numbers that vary, and the speeds of every round."""
    row = dict(rounds[0])
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = median(one[name] for one in rounds)
    row["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in rounds)
    row["rounds"] = len(rounds)
    row["by_round"] = {name: [one[name] for one in rounds] for name in ("cold", "warm", "long")}
    return row


def check(sides: dict[str, dict[str, Any]], expected: dict[str, int]) -> dict[str, list[str]]:
    """Why sides did not do the common work; sides that did are not in the answer.

    A peer must have processed every question as a sequence of its own: exactly the tokens, image tokens, supervised
    tokens and patches that the processor makes of the rows. Our side shares images: it must have supervised the same
    tokens, run over every image and question at least once, and over no more than the separate sequences. All must have
    trained equally many parameters to the same loss.
    """
    refused: dict[str, list[str]] = {}
    if not sides:
        return refused
    reference = fastest(sides).get(OURS) or next(iter(sides.values()))
    trained, loss = reference["trainable_parameters"], reference["loss"]
    for side, row in sides.items():
        reasons = _shared_work(row, expected) if side_of(side) == OURS else _separate_work(row, expected)
        if row["trainable_parameters"] != trained:
            reasons.append(f"{row['trainable_parameters']:,} trained parameters, not {trained:,}")
        if abs(row["loss"] / loss - 1) > LOSS_TOLERANCE:
            reasons.append(f"a loss of {row['loss']:.5f} in epoch 1, not {loss:.5f}")
        if reasons:
            refused[side] = reasons
    return refused


def _padding(counts: dict[str, int]) -> int:
    """Padding of an epoch, by the mask or, where that has more than rows and columns, by the tokens."""
    return max(counts.get("padding", 0), counts.get("seen_padding", 0))


def _separate_work(row: dict[str, Any], expected: dict[str, int]) -> list[str]:
    """What is wrong with the counts of a side that gives every question a sequence of its own."""
    reasons = []
    for number, counts in enumerate(row["epochs"], start=1):
        found = {name: counts.get(name, 0) for name in ("image_tokens", "supervised", "patches")}
        found["tokens"] = counts["language_tokens"] - _padding(counts)
        reasons += [
            f"{value:,} {name} in epoch {number}, not {expected[name]:,}"
            for name, value in found.items()
            if value != expected[name]
        ]
    return reasons


def _shared_work(row: dict[str, Any], expected: dict[str, int]) -> list[str]:
    """What is wrong with the counts of our side."""
    reasons = []
    # The last token of a question predicts nothing, so it need not be computed.
    least = expected["own_tokens"] + expected["distinct_prefix_tokens"] - expected["questions"]
    for number, counts in enumerate(row["epochs"], start=1):
        supervised = counts.get("head_rows", 0)
        if supervised != expected["supervised"]:
            reasons.append(f"{supervised:,} supervised in epoch {number}, not {expected['supervised']:,}")
        tokens = counts["language_tokens"] - _padding(counts)
        if not least <= tokens <= expected["tokens"]:
            reasons.append(f"{tokens:,} tokens in epoch {number}, not {least:,} to {expected['tokens']:,}")
    patches = row["preparation"].get("patches", 0) + row["epochs"][0].get("patches", 0)
    if patches < expected["distinct_patches"]:
        reasons.append(f"{patches:,} patches until the end of epoch 1, not at least {expected['distinct_patches']:,}")
    return reasons


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: rounds of each side, also of those that were refused, questions and epochs."""
    sides = {name: 1.0 for name in result["refused"]} | {
        name: float(row["rounds"]) for name, row in result["sides"].items()
    }
    return sides | {"questions": result["expected"]["questions"], "epochs": result["epochs"]}


def ratios(sides: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    """How many times faster than each peer our side is, each in its fastest format: the median over paired rounds."""
    found = fastest(sides)
    if OURS not in found:
        return {}
    ours = found[OURS]["by_round"][name]
    return {
        side: median(mine / theirs for mine, theirs in zip(ours, row["by_round"][name], strict=False))
        for side, row in found.items()
        if side != OURS
    }


def tables(folder: Path) -> str:
    """All result files of a folder, as Markdown."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("throughput_*.json"))]
    return "\n\n".join([_overview(results), *(_detail(result) for result in results)])


PEERS = {"msswift": "ms-swift", "llamafactory": "LLaMA-Factory", "trl": "TRL"}
ROWS = {
    "easy_vqa": "easy-VQA, {k:.1f} questions an image",
    "chartqa": "ChartQA, {k:.1f} questions an image",
    "k1": "ChartQA, one question an image",
}
MODELS = {
    "small": "Qwen2.5-VL of {:.0f} M",
    "medium": "Qwen2.5-VL of {:.0f} M",
    "qwen3_5": "Qwen3.5 of {:.0f} M",
    "paligemma": "PaliGemma of {:.0f} M, which cannot share",
}


def readme_table(folder: Path) -> str:
    """Questions a second over all epochs beside each peer: what the first page of the project shows."""
    lines = [
        f"| rows | model | vlm-sft, questions/s | {' | '.join(PEERS.values())} | beside the fastest |",
        "|---|---|---:" + "|---:" * (len(PEERS) + 1) + "|",
    ]
    devices = set()
    for case, shape in ((case, shape) for case in ROWS for shape in MODELS):
        path = folder / f"throughput_{case}_{shape}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        sides, expected = fastest(result["sides"]), result["expected"]
        rows = ROWS[case].format(k=expected["questions"] / expected["images"])
        model = MODELS[shape].format(result["sizes"]["total"] / 1e6)
        if not any(map(is_narrow, result["sides"])):
            model += ", float32"
        theirs = " | ".join(f"{sides[name]['long']:.2f}" if name in sides else "not run" for name in PEERS)
        times = min(ratios(sides, "long").values())
        lines.append(f"| {rows} | {model} | {sides[OURS]['long']:.2f} | {theirs} | **{times:.1f}x** |")
        devices.add(result["device"])
    formats = "each side's fastest of float32 and bfloat16, where a row does not name one"
    same = f"LoRA in {formats}, the same rows, batches and loss on every side, preparation counted."
    told = f"{', '.join(sorted(devices))}; {same}"
    return "\n".join([*lines, "", told])


def _overview(results: list[dict[str, Any]]) -> str:
    """Our side against the best peer, a line for each case and shape."""
    lines = [
        "| rows | model | questions / images | best peer | cold | over the epochs | warm "
        "| FLOPs saved, cold / epochs / warm | at the matrix peak, cold / epochs / warm |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        found = {name: ratios(result["sides"], name) for name in ("cold", "long", "warm")}
        if not found["cold"]:
            continue
        best = min(found["cold"], key=found["cold"].__getitem__)
        least = {name: f"{min(values.values()):.1f}x" for name, values in found.items()}
        expected, sizes, epochs = result["expected"], result["sizes"], result["epochs"]
        saved = " / ".join(f"{value:.1f}x" for value in saved_by_arithmetic(expected, sizes, epochs).values())
        sides = fastest(result["sides"])
        ours, peer = sides[OURS], sides[best]
        possible = limits(expected, sizes, epochs, ours["flops_by_arithmetic"], ours["matrix_peak"])
        highest = " / ".join(f"{value / peer[name]:.1f}x" for name, value in possible.items())
        lines.append(
            f"| {result['case']} | {result['shape']}, {sizes['total'] / 1e6:.0f} M | {expected['questions']} / "
            f"{expected['images']} | {best} | {least['cold']} | {least['long']} | {least['warm']} "
            f"| {saved} | {highest} |"
        )
    return "\n".join(lines)


def _detail(result: dict[str, Any]) -> str:
    """Every side on one case and shape."""
    epochs = result["epochs"]
    lines = [
        f"**{result['case']}, {result['shape']}** ({result['device']}, {result['threads']} threads, batch "
        f"{result['batch']}, commit {(result['git']['hash'] or 'unknown')[:7]}"
        f"{' (dirty)' if result['git']['dirty'] else ''}; `{' '.join(result['command'])}`)",
        "",
        f"| side | rounds | cold, questions/s | warm | {epochs} epochs | preparation, s | language tokens / epoch "
        "| padding | waiting | vision tower calls, cold / warm | memory, GB | of the matrix peak | loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for side, row in result["sides"].items():
        mark = " (extrapolated)" if row["extrapolated"] else ""
        rounds = row.get("rounds", result["rounds"])
        lines.append(
            f"| {side} | {rounds} | {row['cold']:.2f} | {row['warm']:.2f} | {row['long']:.2f}{mark} "
            f"| {row['preparation_seconds']:.1f} | {row['epochs'][0]['language_tokens']:,} "
            f"| {100 * row['padding_share']:.1f} % | {100 * row['data_wait_share']:.1f} % "
            f"| {row['cold_tower_calls']} / {row['warm_tower_calls']} | {row['peak_memory_bytes'] / 1e9:.2f} "
            f"| {100 * row['share_of_peak']:.0f} % | {row['loss']:.5f} |"
        )
    lines += [f"\n{side} is not reported: {'; '.join(why)}." for side, why in result["refused"].items()]
    packages = ("transformers", "peft", "trl", "llamafactory", "ms-swift")
    named = [
        f"{side}: " + ", ".join(f"{name} {row['versions'][name]}" for name in packages if name in row["versions"])
        for side, row in result["sides"].items()
    ]
    return "\n".join([*lines, "", f"torch {result['versions']['torch']}. " + "; ".join(named) + "."])

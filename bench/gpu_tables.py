"""The result files of the GPU check as Markdown. Pure: no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GB = 1e9


def tables(folder: Path) -> str:
    """All result files of a folder."""
    return "\n\n".join(
        _one(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("gpu_check-*"))
    )


def _one(result: dict[str, Any]) -> str:
    """One machine."""
    steps = result["steps"]
    lines = [f"**{result['device']}** ({', '.join(f'{name} {value}' for name, value in _versions(result))})"]
    writers: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
        "installed": _installed,
        "modes": _modes,
        "kernels": _kernels,
        "features": _features,
        "memory": _memory,
        "questions": _questions,
        "training": _commands,
        "answers": _answers,
        "launches": _launches,
    }
    for name, write in writers.items():
        if name not in steps:
            continue
        step = steps[name]
        git = step["git"]
        commit = f"{(git['hash'] or 'unknown')[:7]}{' (dirty)' if git['dirty'] else ''}"
        lines += [
            "",
            f"*{name}*, commit {commit}" + (f", **failed**: {step['failed']}" if "failed" in step else ""),
            "",
        ]
        lines += write(step) if "failed" not in step or step.get("rows") else ()
    return "\n".join(lines)


def _versions(result: dict[str, Any]) -> list[tuple[str, str]]:
    shown = ("torch", "transformers", "peft", "deepspeed", "liger-kernel", "triton")
    return [(name, value) for name, value in result["versions"].items() if name in shown and value]


def _installed(step: dict[str, Any]) -> Iterator[str]:
    peaks = step["peaks"]
    listed = f"{peaks['data_sheet'] / 1e12:.0f} by its data sheet" if peaks["data_sheet"] else "not in the table"
    yield f"One large product: {peaks['measured'] / 1e12:.0f} TFLOP/s measured, {listed}. " + (
        f"FlashAttention is not used: {step['flash_problem']}." if step["flash_problem"] else "FlashAttention is used."
    )


def _speed(row: dict[str, Any]) -> str:
    """The cells of one timed pass."""
    if "failed" in row:
        return f"{row['failed']} | | | | |"
    mfu = f"{100 * row['mfu']:.0f} % | {100 * row['language_mfu']:.0f} %" if row["mfu"] else " | "
    memory = f"{row['peak_bytes'] / GB:.1f}" if row["peak_bytes"] else ""
    cut = ", cut in two" if row["cut_in_two"] else ""
    return (
        f"{row['first_seconds']:.2f} / {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} | {mfu} | {memory}{cut} |"
    )


SPEED = "first / later pass, s | tokens/s | MFU | of the language model | memory, GB |"


def _modes(step: dict[str, Any]) -> Iterator[str]:
    if "tokens" in step:
        yield (
            f"One pack: {step['tokens']:,} tokens, {step['questions']} questions on {step['images']} images, "
            f"{step['patches']:,} patches; {step['parameters']['total'] / 1e9:.1f} B parameters."
        )
    yield from ("", f"| mode | {SPEED}", "|---|---:|---:|---:|---:|---:|")
    yield from (f"| {row['mode']} | {_speed(row)}" for row in step["rows"])
    if "profile" in step:
        yield from ("", f"Where the time goes without dropout: {_shares(step['profile'])}.")


def _shares(profile: dict[str, Any]) -> str:
    """The groups of kernels with their shares of the time."""
    total = sum(profile["groups"].values())
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in profile["groups"].items())
    return f"{shares} ({profile['calls']:,} kernels, {total:.3f} s)"


def _kernels(step: dict[str, Any]) -> Iterator[str]:
    yield "| what | sizes | SDPA, forward / both, ms | flash, forward / both, ms | first, ms | errors, SDPA / flash |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in step["rows"]:
        times = " | ".join(
            f"{row[f'{name}_forward_ms']:.2f} / {row[f'{name}_both_ms']:.2f}" for name in ("sdpa", "flash")
        )
        errors = " / ".join(f"{max(row[f'{name}_errors']):.1e}" for name in ("sdpa", "flash"))
        yield f"| {row['what']} | {row['sizes']} | {times} | {row['flash_first_ms']:.0f} | {errors} |"


def _features(step: dict[str, Any]) -> Iterator[str]:
    yield from (f"| images as | {SPEED}", "|---|---:|---:|---:|---:|---:|")
    yield from (f"| {row['mode']} | {_speed(row)}" for row in step["rows"])
    if "copies" in step:
        ways = (
            f"{name} {1e3 * one['seconds']:.1f} ms ({one['bytes'] / 1e6:.0f} MB)"
            for name, one in step["copies"].items()
        )
        yield from ("", f"The pixels of the pack to the device: {', '.join(ways)}.")
    if "tower_seconds" in step:
        yield f"The tower alone, without gradients: {step['tower_seconds']:.3f} s, {step['tower_patches']:,} patches."
    for name, what in (("profile", "a pass with kept features"), ("tower_profile", "the tower")):
        if name in step:
            yield f"Where the time of {what} goes: {_shares(step[name])}."


def _memory(step: dict[str, Any]) -> Iterator[str]:
    if "skipped" in step:
        yield f"Left out: {step['skipped']}."
        return
    yield "| memory for activations | cut in two | loss, whole pack | largest difference of a gradient |"
    yield "|---:|---|---:|---:|"
    for row in step["rows"]:
        cut = "too large even so" if row["too_large"] else "yes" if row["cut_in_two"] else "no"
        losses = f"{_number(row['loss'])}, {_number(row['whole_loss'])}"
        yield (
            f"| {100 * row['share']:.0f} % of what it takes | {cut} | {losses} "
            f"| {_error(row['largest_gradient_error'])} |"
        )


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _questions(step: dict[str, Any]) -> Iterator[str]:
    for side, row in step.get("sides", {}).items():
        yield (
            f"{side}: {row['cold']:.1f} questions/s in the first epoch with its preparation "
            f"({row['preparation_seconds']:.1f} s), {row['warm']:.1f} in later ones; "
            f"{100 * row['share_of_peak']:.0f} % of the measured peak, waiting {100 * row['data_wait_share']:.1f} %, "
            f"{row['peak_memory_bytes'] / GB:.1f} GB; "
            f"{step['expected']['questions']} questions on {step['expected']['images']} images ({step['case']})."
        )
    yield from (f"{side} is not reported: {'; '.join(reasons)}." for side, reasons in step.get("refused", {}).items())


def _ended(row: dict[str, Any]) -> str:
    return f"code {row['code']} | {row['seconds']:.1f} |"


def _commands(step: dict[str, Any]) -> Iterator[str]:
    yield from ("| command | ended with | s |", "|---|---|---:|")
    yield from (f"| {row['command']} | {_ended(row)}" for row in step["rows"])
    if "resumed" in step:
        equal = "bit for bit" if step["resumed"]["bit_equal"] else f"up to {step['resumed']['largest_difference']:.1e}"
        yield from ("", f"The adapter of the resumed run equals that of the run that was not stopped {equal}.")


def _answers(step: dict[str, Any]) -> Iterator[str]:
    if "scores" in step:
        scores = ", ".join(f"{name} {100 * value:.1f} %" for name, value in step["scores"].items())
        yield f"pocket on demo_charts: {step['equal_answers']} of {step['questions']} answers are the same; {scores}."


def _launches(step: dict[str, Any]) -> Iterator[str]:
    yield from ("| launcher | ended with | s | losses |", "|---|---|---:|---|")
    for row in step["rows"]:
        yield f"| {row['launch']} | {_ended(row)} {', '.join(f'{loss:.4f}' for loss in row['losses'])} |"

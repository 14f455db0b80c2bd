"""Attention over a pack of shared image prefixes: which kernel is fastest on this GPU, and whether all agree.

    python bench/attention.py [--device cuda|cpu] [--images N] [--prefix TOKENS] [--questions N] [--question TOKENS]
        [--heads N] [--kv_heads N] [--width N] [--rounds N]
    python bench/attention.py --tables     writes the table into bench/README.md from the result file

One layer's attention at the sizes of Qwen2.5-VL-7B in bfloat16, forward and backward: `sdpa`, one call with a mask an
image; `varlen`, one variable-length FlashAttention call whose keys are gathered; `flex`, FlexAttention with a block
mask, compiled; and `separate`, the variable-length call over separate sequences, which repeat the prefix, as a trainer
without sharing computes them. On a CPU there is a trial in float32 without a result file: what runs there is compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from common import README, RESULTS, commit, origin, write_block
from peers.machine import now
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.model.attention import shared_sdpa
from vlm_sft.model.gpu.flash import shared_flash
from vlm_sft.model.pack_context import PackContext, PackLayout, computing

RESULT = RESULTS / "attention.json"
REFERENCE = "sdpa"
SIZES = {
    "images": (8, "of a pack"),
    "prefix": (700, "tokens of an image with the text before it"),
    "questions": (2, "an image"),
    "question": (40, "tokens of a question with its answer"),
    "heads": (28, "of the queries"),
    "kv_heads": (4, "of the keys"),
    "width": (128, "channels of a head"),
    "rounds": (20, "in which the kernels take turns"),
}
Kernel = Callable[[list[torch.Tensor]], torch.Tensor]
Timed = tuple[Kernel, torch.Tensor | None]  # with the tokens of its sequences where they are not those of the pack


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    for name, (value, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result file")
    args = parser.parse_args()
    if args.device == "cuda" and not args.tables and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; --device cpu compares what runs here")
    return args


def branches(images: int, prefix: int, questions: int, question: int) -> list[list[int]]:
    """The layout of a pack of equal images, as `PackLayout` has it."""
    whole = prefix + questions * question
    ends = [0, *(prefix + number * question for number in range(questions + 1))]
    return [[image * whole + end for end in ends] for image in range(images)]


def flex(layout: PackLayout, device: torch.device) -> Kernel:
    """FlexAttention with the pack's mask as blocks; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    image = torch.empty(layout.length, dtype=torch.int64, device=device)
    branch = torch.empty_like(image)
    for number, ends in enumerate(layout.branches):
        image[ends[0] : ends[-1]] = number
        for which, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
            branch[start:end] = which

    def sees(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (branch[key] == 0) | (branch[key] == branch[query])
        return (image[key] == image[query]) & own & (key <= query)

    blocks = create_block_mask(sees, None, None, layout.length, layout.length, device=device)
    call: Any = torch.compile(flex_attention) if device.type == "cuda" else flex_attention

    def kernel(states: list[torch.Tensor]) -> torch.Tensor:
        return call(*states, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return kernel


def ours(function: Any, layout: PackLayout) -> Kernel:
    """One of the package's attention functions over a pack."""

    def kernel(states: list[torch.Tensor]) -> torch.Tensor:
        with computing(PackContext(layout=layout)):
            return function(torch.nn.Module(), *states, None)[0]

    return kernel


def separate_layout(layout: PackLayout) -> tuple[PackLayout, torch.Tensor]:
    """Every question with a prefix of its own, and the tokens of the pack that those sequences are made of."""
    tokens: list[torch.Tensor] = []
    ends: list[list[int]] = []
    for first, prefix, *questions in layout.branches:
        for start, end in zip([prefix, *questions], questions, strict=False):
            tokens += [torch.arange(first, prefix), torch.arange(start, end)]
            begin = ends[-1][-1] if ends else 0
            # Prefix and question are one causal sequence: one branch, no gathered keys.
            ends.append([begin, begin + prefix - first + end - start])
    return PackLayout(ends[-1][-1], ends), torch.cat(tokens)


def kernels(layout: PackLayout, device: torch.device) -> dict[str, Timed]:
    """Every kernel of this device."""
    apart, tokens = separate_layout(layout)
    found: dict[str, Timed] = {REFERENCE: (ours(shared_sdpa, layout), None), "flex": (flex(layout, device), None)}
    if device.type == "cuda":
        found["varlen"] = (ours(shared_flash, layout), None)
    # Where FlashAttention does not run `shared_flash` is SDPA.
    return found | {"separate": (ours(shared_flash, apart), tokens.to(device))}


def run(kernel: Kernel, states: list[torch.Tensor], backward: bool) -> list[torch.Tensor]:
    """The output (1, L, H, D), and the gradients of its sum where they are asked for."""
    inputs = [state.detach().requires_grad_(backward) for state in states]
    with torch.set_grad_enabled(backward):
        output = kernel(inputs)
        return [output.detach(), *(torch.autograd.grad(output.sum(), inputs) if backward else ())]


def timed(kernel: Kernel, states: list[torch.Tensor], backward: bool) -> float:
    """Milliseconds of one run."""
    began = now()
    run(kernel, states, backward)
    return 1e3 * (now() - began)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a kernel: milliseconds forward, and with backward, and the largest difference from exact values."""
    device = torch.device(args.device)
    layout = PackLayout(
        args.images * (args.prefix + args.questions * args.question),
        branches(args.images, args.prefix, args.questions, args.question),
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, layout.length, args.width) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    exact = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    states = [state.to(torch.bfloat16) for state in exact] if device.type == "cuda" else exact
    exact = [state.double() for state in states]
    found = kernels(layout, device)
    expected = run(ours(shared_sdpa, layout), exact, False)[0]
    inputs, differences = {}, {}
    for name, (kernel, tokens) in found.items():
        inputs[name] = states if tokens is None else [state.index_select(2, tokens) for state in states]
        right = expected if tokens is None else expected.index_select(1, tokens)
        differences[name] = float((run(kernel, inputs[name], False)[0].double() - right).abs().max())
    # FlexAttention has no backward pass on a CPU.
    passes = {"forward": False, "both": True} if device.type == "cuda" else {"forward": False}
    times: dict[str, dict[str, list[float]]] = {name: {key: [] for key in passes} for name in found}
    for _ in range(args.rounds + 1):  # the first compiles and is left out
        for name, (kernel, _tokens) in found.items():
            for key, backward in passes.items():
                times[name][key].append(timed(kernel, inputs[name], backward))
    return [
        {
            "kernel": name,
            "tokens": inputs[name][0].shape[2],
            "difference": differences[name],
            **{f"{key}_ms": median(values[1:]) for key, values in times[name].items()},
        }
        for name in found
    ]


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    reference = next(row for row in result["rows"] if row["kernel"] == REFERENCE)
    lines = [
        "| kernel | tokens | forward, ms | forward and backward, ms | against sdpa | largest difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        key = "both_ms" if "both_ms" in row else "forward_ms"
        both = f"{row['both_ms']:.2f}" if "both_ms" in row else ""
        lines.append(
            f"| {row['kernel']} | {row['tokens']:,} | {row['forward_ms']:.2f} | {both} "
            f"| {reference[key] / row[key]:.2f}x | {row['difference']:.1e} |"
        )
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    return "\n".join([*lines, "", f"{result['device']}, {sizes}, commit {commit(result)}."])


def main() -> int:
    """Measure, and write the result file and the table."""
    args = parse()
    if not args.tables:
        result = origin() | {"sizes": {name: getattr(args, name) for name in SIZES}, "rows": measure(args)}
        if args.device == "cpu":
            say(table(result))
            return 0
        say(f"written: {artifacts.write_json(RESULT, result)}")
    write_block("attention", "Attention kernels", table(artifacts.read_json(RESULT)))
    say(f"written: {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

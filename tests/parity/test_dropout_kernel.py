"""The Triton kernel of keyed dropout gives the values of the formula: in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vlm_sft.model import dropout
from vlm_sft.model.dropout import KeyedDropout, fused_dropout, fused_problem, stepwise_dropout
from vlm_sft.model.gpu.kernels import choose_kernels
from vlm_sft.model.pack_context import PackContext, computing

SHAPES = [(1, 1), (3, 17), (37, 1100), (64, 1024), (5, 2049)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def keys_of(tokens: int) -> torch.Tensor:
    """Keys as packs have them, and some whose products overflow in every way."""
    keys = (70_000 * 1_048_576 + 3) * 65_536 + torch.arange(tokens)
    extreme = torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**32])[: max(tokens - 1, 0)]
    keys[: len(extreme)] = extreme
    return keys


def compare(device: str) -> None:
    """Values and gradients of kernel and formula, over several batches at once, at all shapes and formats."""
    for tokens, channels in SHAPES:
        for probability in (0.05, 0.5, 0.999):
            for dtype in dropout.KERNEL_DTYPES:
                case = f"{tokens} x {channels}, {probability}, {dtype}"
                torch.manual_seed(0)
                values, slope = torch.randn(2, 2, tokens, channels).to(dtype)
                values[0, 0, 0] = torch.inf
                results = []
                for function, place in ((stepwise_dropout, "cpu"), (fused_dropout, device)):
                    inputs = values.to(place).requires_grad_()
                    found = function(inputs, keys_of(tokens).to(place), probability, 11 * tokens)
                    (gradient,) = torch.autograd.grad(found, inputs, slope.to(place))
                    results.append([found.detach().cpu(), gradient.cpu()])
                for exact, ours in zip(*results, strict=True):
                    assert torch.equal(ours == 0, exact == 0), f"{case}: other mask"
                    assert torch.equal(ours.isnan(), exact.isnan()), f"{case}: a value that is not finite is hidden"
                    if device == "cpu" and dtype is torch.bfloat16:  # Triton's interpreter rounds towards zero
                        torch.testing.assert_close(ours, exact, rtol=2**-7, atol=0, equal_nan=True)
                    else:
                        torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True, msg=case)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_is_the_formula_in_the_interpreter() -> None:
    """In a process of its own: Triton reads the switch when a kernel is defined."""
    code = "from tests.parity.test_dropout_kernel import compare; compare('cpu'); print('compared')"
    setting = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=setting, capture_output=True, text=True, check=False)
    assert done.stdout == "compared\n", done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(values: str) -> None:
    """The interpreter takes more of Python than the compiler does."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlm_sft.model.gpu.dropout_kernel import _drop

    numbers = {"row_factor": "i64", "column_factor": "i64", "threshold": "i32", "scale": "fp32"}
    sizes = dict.fromkeys(("tokens", "rows", "channels"), "i32")
    constants = {"prime_a": 0x2C1B3C6D, "shift_a": 15, "prime_b": 0x297A2D39, "shift_b": 13}
    constants |= {"tile_rows": 4, "tile_columns": 1024}
    signature = {"values": f"*{values}", "keys": "*i64", "output": f"*{values}"} | numbers | sizes
    source = ASTSource(_drop, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    for capability in (80, 90):
        assert "mul.lo.s32" in compiled(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@needs_gpu
def test_the_kernel_is_the_formula_on_this_gpu() -> None:
    assert fused_problem(torch.device("cuda", torch.cuda.current_device())) is None
    compare("cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpointed_layer_under_autocast_draws_the_same_mask_again(dtype: torch.dtype) -> None:
    layer, linear = KeyedDropout(0.3, 5), torch.nn.Linear(96, 64).cuda()
    values = torch.randn(1, 50, 96, device="cuda", dtype=dtype, requires_grad=True)
    keys = keys_of(50).cuda()

    def body(inputs: torch.Tensor) -> torch.Tensor:
        return linear(layer(inputs))

    gradients = []
    for checkpointed in (False, True):
        with computing(PackContext(keys=keys, step=3)):
            with torch.autocast("cuda", torch.bfloat16):
                output = checkpoint(body, values, use_reentrant=False) if checkpointed else body(values)
            gradients.append(torch.autograd.grad(output.float().square().sum(), [values, linear.weight]))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_a_kernel_that_differs_is_not_used_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides on a GPU, with the formula in the kernel's place on the CPU."""
    device = torch.device("cpu")
    monkeypatch.setattr(dropout, "fused_dropout", stepwise_dropout)
    assert dropout.kernel_problem(device) is None
    monkeypatch.setattr(dropout, "fused_dropout", lambda values, keys, p, seed: stepwise_dropout(values, keys, p, 4))
    problem = dropout.kernel_problem(device)
    assert problem is not None and "other values than the formula" in problem
    model = torch.nn.Sequential(KeyedDropout(0.1, 1))
    assert choose_kernels(model, device) == ({"dropout": "stepwise"}, [])
    monkeypatch.setattr("vlm_sft.model.gpu.kernels.fused_problem", lambda device: problem)
    kernels, notes = choose_kernels(model, torch.device("cuda", 0))
    assert kernels == {"dropout": "stepwise"} and len(notes) == 1 and str(problem) in notes[0]
    assert choose_kernels(torch.nn.Linear(2, 2), torch.device("cuda", 0)) == ({}, [])


def test_without_a_gpu_the_formula_computes() -> None:
    assert fused_problem(torch.device("cpu")) == "no GPU"
    layer, keys = KeyedDropout(0.3, 5), keys_of(40)
    values = torch.randn(1, 40, 24)
    with computing(PackContext(keys=keys, step=2)):
        found = layer(values)
    assert torch.equal(found, stepwise_dropout(values, keys, 0.3, dropout._mix(5 * 1_000_003 + 2)))

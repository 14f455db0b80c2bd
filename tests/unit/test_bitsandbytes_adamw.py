"""AdamW of bitsandbytes: the steps of AdamW within 8 bits, exact resumes, bytes as forecast, refusals in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.faults import training
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.common.errors import RecipeError
from vlm_sft.forecast import disk
from vlm_sft.forecast.flops import Adapter, Work
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.memory import peak_items
from vlm_sft.forecast.optimizer_state import state_bytes
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.shapes import ModelShape, TextShape, VisionShape, find_published
from vlm_sft.recipe.schema import BITSANDBYTES, Recipe
from vlm_sft.train import bitsandbytes_adamw
from vlm_sft.train.bitsandbytes_adamw import require_bitsandbytes
from vlm_sft.train.checkpoint.serialization import load_state, save_state
from vlm_sft.train.optimization import make_optimizer

pytest.importorskip("bitsandbytes")
RECIPE = Recipe(learning_rate=1e-3, weight_decay=0.1)


def model(width: int = 128) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(width, 2 * width), torch.nn.Tanh(), torch.nn.Linear(2 * width, width))


def steps(optim: str, count: int = 30) -> list[torch.Tensor]:
    made = model()
    optimizer = make_optimizer(made, replace(RECIPE, optim=optim))
    data = torch.randn(count, 16, 128, generator=torch.Generator().manual_seed(1))
    for rows in data:
        (made(rows) - rows.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in made.parameters()]


@pytest.mark.parametrize(
    ("optim", "limit"), [("adamw_8bit", 0.05), ("paged_adamw_8bit", 0.05), ("paged_adamw_32bit", 1e-5)]
)
def test_steps_are_those_of_adamw(optim: str, limit: float) -> None:
    before, expected = list(model().parameters()), steps("adamw_torch")
    for start, found, wanted in zip(before, steps(optim), expected, strict=True):
        assert 0 < (found - wanted).norm() or limit < 1e-4
        assert (found - wanted).norm() <= limit * (wanted - start).norm()


@pytest.mark.parametrize("optim", BITSANDBYTES)
def test_a_resumed_training_has_the_same_weights(optim: str, tmp_path: Path) -> None:
    data = training.prepared(training.samples())
    recipe = replace(training.RECIPE, optim=optim, save_steps=3, lora_r=64)
    whole = training.trainer(data, tmp_path / "whole", recipe=recipe)
    whole.run()
    assert any(state["state1"].dtype == torch.float32 for state in whole.optimization.optimizer.state.values())
    again = training.trainer(data, tmp_path / "again", recipe=recipe)
    again.run(checkpoint=tmp_path / "whole" / "checkpoint-3")
    assert again.state.global_step == 6
    assert all(torch.equal(value, training.weights(whole)[name]) for name, value in training.weights(again).items())


@pytest.mark.parametrize("optim", BITSANDBYTES)
def test_moments_go_on_exactly(optim: str, tmp_path: Path) -> None:
    """Of matrices that are large enough for 8 bits, unlike those of a tiny adapter."""

    def step(made: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        made(torch.linspace(-1, 1, 128)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = model(), model()
    first, second = (make_optimizer(made, replace(RECIPE, optim=optim)) for made in (one, other))
    for _ in range(3):
        step(one, first)
    save_state(tmp_path / "state.safetensors", first.state_dict())
    other.load_state_dict(one.state_dict())
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    bitsandbytes_adamw.page_moments(second)
    for _ in range(3):
        step(one, first)
        step(other, second)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def test_embeddings_keep_moments_of_32_bits() -> None:
    made = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 128))
    optimizer = make_optimizer(made, replace(RECIPE, optim="adamw_8bit"))
    made(torch.arange(100)).sum().backward()
    optimizer.step()
    kinds = {name: optimizer.state[parameter]["state1"].dtype for name, parameter in made.named_parameters()}
    assert kinds == {"0.weight": torch.float32, "1.weight": torch.uint8, "1.bias": torch.float32}


def lora(r: int) -> tuple[ModelShape, Adapter]:
    """A decoder of two layers whose q_proj and v_proj have LoRA."""
    text = TextShape(2, 512, 1024, 8, 8, 64, 1000, 10_000_000, True)
    return ModelShape("qwen2_5_vl", text, VisionShape(1, 64, 1, 0, 1, 4, 0, 1, 588)), Adapter(r, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("optim", "r"), [*((optim, 32) for optim in (*BITSANDBYTES, "adamw_torch")), ("adamw_8bit", 4)]
)
def test_the_forecast_counts_the_bytes_of_the_state(optim: str, r: int, tmp_path: Path) -> None:
    shape, adapter = lora(r)
    matrices = [
        torch.nn.Parameter(torch.randn(*size))
        for linear in adapter.modules(shape) * shape.text.layers
        for size in ((r, linear.inputs), (linear.outputs, r))
    ]
    holder = torch.nn.ParameterList(matrices)
    assert (len(matrices), sum(one.numel() for one in matrices)) == (adapter.tensors(shape), adapter.parameters(shape))
    optimizer = make_optimizer(holder, replace(RECIPE, optim=optim))
    sum(one.sum() for one in matrices).backward()
    optimizer.step()
    maps = ("qmap1", "qmap2")  # shared by all tensors
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1 and name not in maps
    )
    assert state_bytes(shape, adapter, optim) == pytest.approx(held, rel=1e-3)
    save_state(tmp_path / "state", optimizer.state_dict())
    assert disk.optimizer_bytes(shape, adapter, optim) == pytest.approx((tmp_path / "state").stat().st_size, rel=0.03)


def test_paged_moments_make_room_on_a_gpu_where_they_are_large() -> None:
    shape = find_published("Qwen/Qwen2.5-VL-7B-Instruct").shape
    work = Work(packs=1, tokens=1024, squares=1024**2, supervised=10, questions=2, images=1, visual=700)

    def optimizer(optim: str, kind: str, adapter: Adapter) -> float:
        rates = Rates(kind, 1e14, 1e12, 1e-6, 80 * 2**30, kind == "gpu", "", 1.5)
        return peak_items(Setting(shape, adapter, 2, True, rates, optim=optim), work, 0, True)["optimizer"]

    whole, small = Adapter(1, (), everything=True), Adapter(16, ("q_proj", "v_proj"))
    full = optimizer("adamw_torch", "gpu", whole)
    assert full == 8 * shape.parameters
    assert 0.25 < optimizer("adamw_8bit", "gpu", whole) / full < 0.35  # with the embeddings' 32 bits
    assert optimizer("paged_adamw_8bit", "gpu", whole) == optimizer("paged_adamw_32bit", "gpu", whole) == 0
    assert optimizer("paged_adamw_8bit", "cpu", whole) == optimizer("adamw_8bit", "gpu", whole)
    assert optimizer("paged_adamw_32bit", "gpu", small) == optimizer("adamw_torch", "gpu", small) > 0
    assert optimizer("adafactor", "gpu", whole) < 0.02 * full


@pytest.mark.parametrize("optim", BITSANDBYTES)
def test_refusals(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = replace(training.ALONE, deepspeed={"zero_optimization": {"stage": 2}}, parallel="zero2")
    with pytest.raises(RecipeError, match="the engine holds AdamW's state itself"):
        require_bitsandbytes(replace(RECIPE, optim=optim), engine)
    require_bitsandbytes(RECIPE, engine)
    monkeypatch.setattr(bitsandbytes_adamw, "find_spec", lambda name: None)
    command = f"train --base_model pocket --dataset demo_charts --output_dir {tmp_path / 'run'} --optim {optim}"
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert f"optim {optim}: the package" in line_with(told, "bitsandbytes is not installed")
    assert line_with(told, "pip install 'vlm-sft[qlora]'")
    assert not (tmp_path / "run").exists()

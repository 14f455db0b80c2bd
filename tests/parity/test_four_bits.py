"""QLoRA: what 4-bit weights are, that packs stay exact on them, and a training through the public command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import PROMPT, save_base
from tests.questions import adapted, pack, questions
from tests.tiny_models import build
from vlm_sft.cli.main import main
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.forecast.memory import FOUR_BIT_BYTES
from vlm_sft.model import packed_forward
from vlm_sft.model.adapters import parameter_counts
from vlm_sft.model.load import BLOCK_4BIT, find_base, load_model
from vlm_sft.model.sharing_check import choose_mode

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'vlm-sft[qlora]'")

# The sixteen values of NormalFloat4 as published (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("four_bits") / "base")


def loaded(folder: Path, four_bit: bool) -> Any:
    return load_model(find_base(str(folder), bf16=False, prompt=PROMPT, load_in_4bit=four_bit))


def held_in_4bit(model: Any) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if hasattr(weight, "quant_state")}


def meant(weight: Any) -> torch.Tensor:
    """What 4-bit weights stand for."""
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """NF4 by its definition, with scales that are not rounded: the nearest of sixteen values, times the scale."""
    blocks = weight.reshape(-1, BLOCK_4BIT)
    scales = blocks.abs().max(dim=1, keepdim=True).values
    nearest = (blocks / scales)[..., None].sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scales).reshape(weight.shape)


def test_the_language_models_weights_are_4_bit_and_nothing_else_is(folder: Path) -> None:
    whole, short = loaded(folder, False), loaded(folder, True)
    expected, found = dict(whole.named_parameters()), dict(short.named_parameters())
    held = held_in_4bit(short)
    assert expected.keys() == found.keys()
    layers = [name for name in expected if ".language_model.layers." in name]
    # On a CPU not those whose rows are no whole blocks: bitsandbytes computes them wrongly there.
    short_rows = {name for name in layers if name.endswith("down_proj.weight")}
    assert all(expected[name].shape[1] == 96 for name in short_rows)
    assert set(held) == {name for name in layers if name.endswith("proj.weight")} - short_rows
    for name, weight in expected.items():
        if name not in held:
            assert torch.equal(found[name], weight), name
            continue
        # The scales are rounded to 8 bits themselves.
        assert (meant(held[name]) - rounded(weight)).norm() <= 0.03 * weight.norm(), name
        assert (meant(held[name]) - weight).norm() <= 0.15 * weight.norm(), name
    assert parameter_counts(short)[1] == parameter_counts(whole)[1]


def test_a_weight_takes_the_bytes_of_the_forecast() -> None:
    weight = bitsandbytes.nn.Params4bit(torch.randn(1024, 1024), requires_grad=False, quant_type="nf4").to("cpu")
    state = weight.quant_state
    held = [weight.data, state.absmax, state.state2.absmax]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held) / 1024**2
    assert taken == pytest.approx(FOUR_BIT_BYTES, rel=0.001)


def test_packs_on_4_bit_weights_are_those_on_the_values_they_stand_for(folder: Path) -> None:
    short, whole = loaded(folder, True), build("qwen2_5_vl")[0]
    values = {name: meant(weight) for name, weight in held_in_4bit(short).items()}
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            weight.copy_(values.get(name, weight))
    encoder = Encoder(find_base(str(folder)).processor, PROMPT)
    groups = [encoder.encode(questions(seed, 3)) for seed in range(2)]
    batch = pack([Bundle(0, (0, 1, 2)), Bundle(1, (0, 1))], groups)
    results = []
    for model in (adapted(short), adapted(whole)):
        mode = choose_mode(model, encoder)
        with packed_forward.packed(batch, mode, 0):
            loss = packed_forward.token_losses(model, batch, mode).sum()
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        results.append((loss.detach(), gradients))
    (loss, gradients), (expected, truth) = results
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert gradients.keys() == truth.keys() and len(truth) == 12
    for name, gradient in truth.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() > 0, name


def test_training_resume_evaluation_and_merge(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, torn, merged = tmp_path / "run", tmp_path / "torn", tmp_path / "merged"
    line = [
        "train",
        "--base_model",
        str(folder),
        "--dataset",
        "demo_charts",
        "--max_train",
        "16",
        "--max_eval",
        "6",
        "--global_batch_size",
        "4",
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--eval_steps",
        "2",
        "--lora_r",
        "4",
        "--learning_rate",
        "0.01",
        "--max_pixels",
        "15680",
        "--report_to",
        "none",
        "--bf16",
        "false",
        "--load_in_4bit",
        "true",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    assert main([*line, "--output_dir", str(run)]) == 0
    facts = json.loads((run / "run.json").read_text())
    assert facts["lora"]["load_in_4bit"] is True and facts["lora"]["matched_modules"] == 6
    line += ["--resume", str(run / "checkpoint-2"), "--eval_benchmarks", "none"]
    assert main([*line, "--output_dir", str(torn)]) == 0
    trained, resumed = (load_file(one / "adapter_model.safetensors") for one in (run, torn))
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    assert any(weight.abs().max() > 1e-3 for name, weight in trained.items() if "lora_B" in name)
    # The scores of the run come again from the same numbers, and only from them.
    asked = ["eval", "--base_model", str(folder), "--adapter", str(run), "--benchmark", "demo_charts", "--limit", "6"]
    asked += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "again")]
    assert main([*asked, "--load_in_4bit"]) == 0
    again = (tmp_path / "again" / "demo_charts" / "predictions.jsonl").read_text().splitlines()
    recorded = (run / "evaluation" / "tuned" / "demo_charts" / "predictions.jsonl").read_text().splitlines()
    answers = [{row["id"]: row["prediction"] for row in map(json.loads, lines)} for lines in (again, recorded)]
    assert answers[0] == answers[1]
    assert main(asked) == 2 and "load_in_4bit True instead of False" in capsys.readouterr().err
    # Merged into the weights in their own format, not into the rounded ones.
    assert main(["export", "--adapter", str(run), "--merge", "--output_dir", str(merged)]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(merged / "model.safetensors")
    name = next(name for name in before if name.endswith("layers.0.self_attn.q_proj.weight"))
    stem = next(key for key in trained if key.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    update = trained[stem.replace("lora_A", "lora_B")] @ trained[stem]
    scale = facts["lora"]["alpha"] / facts["lora"]["r"]
    assert torch.allclose(after[name], before[name] + scale * update, atol=1e-6)

"""`--bf16 auto` on a CPU: measured, recorded, gone on with, and repeated by evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm_sft.cli.main import main
from vlm_sft.common import artifacts, record
from vlm_sft.model import saved_adapter
from vlm_sft.model.load import Base, find_base
from vlm_sft.model.saved_adapter import recorded_bf16
from vlm_sft.planning import number_format
from vlm_sft.planning.number_format import FormatRates, decide_format, measure_formats, settle_format
from vlm_sft.planning.run_setting import shape_of
from vlm_sft.recipe.schema import Recipe

FLAGS = ("avx512_bf16", "amx_bf16")
PAYS = FormatRates(1e11, 1.5e11, 1.2, FLAGS)


@pytest.fixture(scope="module")
def base() -> Base:
    return find_base("pocket")


def measured(monkeypatch: pytest.MonkeyPatch, rates: FormatRates) -> list[int]:
    """Let the processor have bfloat16, and measurements find these rates; counts them."""
    calls: list[int] = []

    def measure(shape: object) -> FormatRates:
        calls.append(1)
        return rates

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (number_format, saved_adapter):
        monkeypatch.setattr(module, "bfloat16_flags", lambda: FLAGS)
    monkeypatch.setattr(number_format, "measure_formats", measure)
    monkeypatch.setattr(number_format, "NARROWEST", 1)  # tiny models stand for large ones
    return calls


@pytest.mark.parametrize(
    ("rates", "dtype"),
    [
        (PAYS, torch.bfloat16),
        (replace(PAYS, bfloat16_flops=1.49e11), torch.float32),
        (replace(PAYS, layer_ratio=1.19), torch.float32),
    ],
)
def test_auto_takes_what_pays(
    rates: FormatRates,
    dtype: torch.dtype,
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = measured(monkeypatch, rates)
    found, facts = settle_format(base, Recipe(), engine=False, checkpoint=None)
    assert (found.dtype, len(calls)) == (dtype, 1)
    assert facts["float32_flops"] == 1e11 and facts["flags"] == FLAGS
    line = capsys.readouterr().out
    assert line.startswith(f"computing in {found.dtype_name}: products 1") and line.count("\n") == 1
    assert "100 in float32" in line and "avx512_bf16, amx_bf16" in line


def test_what_is_not_measured_says_why(
    base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = measured(monkeypatch, PAYS)

    def settled(recipe: Recipe, reason: str, engine: bool = False) -> None:
        found, facts = settle_format(base, recipe, engine=engine, checkpoint=None)
        assert found == base and reason in facts["reason"]
        assert capsys.readouterr().out == f"computing in float32: {facts['reason']}\n"

    for recipe in (Recipe(train=("all",)), Recipe(load_in_4bit=True)):
        settled(recipe, "only frozen weights")
    settled(Recipe(), "DeepSpeed and FSDP", engine=True)
    assert "family 'later'" in str(decide_format(replace(shape_of(base), kind="later"), Recipe(), engine=False))
    capsys.readouterr()
    with monkeypatch.context() as narrow:
        narrow.setattr(number_format, "NARROWEST", 256)
        settled(Recipe(), "less than 256 channels")
    monkeypatch.setattr(number_format, "bfloat16_flags", lambda: ())
    settled(Recipe(), "this processor has no instructions for bfloat16")
    assert not calls


def test_where_there_is_nothing_to_choose(
    base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = measured(monkeypatch, PAYS)
    for recipe in (Recipe(bf16=True), Recipe(bf16=False)):
        assert settle_format(base, recipe, engine=False, checkpoint=None) == (base, {})
    monkeypatch.setenv("VLM_SFT_PLAIN", "1")
    assert settle_format(base, Recipe(), engine=False, checkpoint=None) == (base, {})
    assert not calls and capsys.readouterr().out == ""
    assert find_base("pocket", bf16=True).dtype == torch.bfloat16


@pytest.mark.parametrize(("saved", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_resume_goes_on_in_its_format(
    saved: str, dtype: torch.dtype, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(monkeypatch, PAYS)
    monkeypatch.setattr(number_format, "read_manifest", lambda _: {"identity": {"dtype": saved}})
    found, _ = settle_format(base, Recipe(), engine=False, checkpoint=tmp_path)
    assert (found.dtype, calls) == (dtype, [])


def test_a_real_measurement(base: Base) -> None:
    rates = measure_formats(shape_of(base))
    assert 1e8 < rates.float32_flops < 1e14 and 1e8 < rates.bfloat16_flops < 1e14
    assert 0.01 < rates.layer_ratio < 30
    assert rates.pays == (rates.product_ratio >= 1.5 and rates.layer_ratio >= 1.2)


@pytest.mark.parametrize(
    ("words", "limit", "flags"),
    [
        ("sse2 avx512_bf16 amx_bf16", None, FLAGS),
        ("sse2 avx512_bf16", None, FLAGS[:1]),
        ("sse2 avx512f", None, ()),
        ("sse2 avx512_bf16", "AVX512_CORE", ()),
        ("sse2 avx512_bf16", "avx512_core_bf16", FLAGS[:1]),
    ],
)
def test_flags_of_the_processor(
    words: str, limit: str | None, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {words}\n")
    monkeypatch.setattr(record, "Path", lambda _: info)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert record.bfloat16_flags() == flags


def test_a_run_and_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen in training, recorded, and taken by evaluation and `ask`; another processor answers in float32."""
    calls = measured(monkeypatch, PAYS)
    run, answers = tmp_path / "run", tmp_path / "answers"
    cache = f"--cache_dir {tmp_path / 'cache'}"
    command = f"train --base_model pocket --dataset demo_charts --output_dir {run} --max_steps 2 --max_train 8 {cache} "
    command += "--global_batch_size 4 --eval_strategy no --load_best_model_at_end false --eval_benchmarks none "
    assert main([*command.split(), "--report_to", "none"]) == 0
    facts = artifacts.read_json(run / artifacts.RUN)
    assert facts["dtype"] == "bfloat16" and len(calls) == 1
    assert facts["number_format"]["bfloat16_flops"] == 1.5e11 and facts["number_format"]["flags"] == list(FLAGS)
    command = f"eval --base_model pocket --adapter {run} --benchmark demo_charts --output_dir {answers} {cache}"
    assert main([*command.split(), "--limit", "4"]) == 0
    assert artifacts.read_json(answers / artifacts.RUN)["dtype"] == "bfloat16"
    assert recorded_bf16(run) is True
    monkeypatch.setattr(saved_adapter, "bfloat16_flags", lambda: ())
    assert recorded_bf16(run) == "auto"


def test_whose_record_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, PAYS)
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert recorded_bf16(checkpoint) == "auto"
    (tmp_path / artifacts.RUN).write_text('{"dtype": "bfloat16"}')
    assert recorded_bf16(checkpoint) is True and recorded_bf16(tmp_path) is True
    (checkpoint / artifacts.RUN).write_text('{"dtype": "float32"}')
    assert recorded_bf16(checkpoint) is False
    (checkpoint / artifacts.RUN).write_text("{")
    assert recorded_bf16(checkpoint) == "auto"

"""What a run computes does not depend on caches, sharing or packing; what is cached is never stale."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import Warm
from tests.questions import PROMPT, questions
from tests.tiny_models import build, save
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.packing import EpochPlanner, GroupLengths
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import ImageRef, Sample

SIZES = [(72, 56), (140, 90), (72, 56), (56, 300)]


def samples() -> list[Sample]:
    return [sample for seed, size in enumerate(SIZES) for sample in questions(seed, 3, size)]


def prepare(
    root: Path,
    asked: list[Sample],
    family: str = "qwen2_5_vl",
    prompt: PromptSettings = PROMPT,
    change: Callable[[Any], None] = lambda processor: None,
) -> tuple[PreparedData, DataCache]:
    _, processor = build(family)
    change(processor)
    encoder = Encoder(processor, prompt)
    cache = DataCache(encoder, root, "tiny")
    return PreparedData(asked, encoder, "preparing", cache), cache


def equal(left: EncodedGroup, right: EncodedGroup) -> bool:
    questions_equal = all(
        a.sample_id == b.sample_id and (a.prompt_ids == b.prompt_ids).all() and (a.answer_ids == b.answer_ids).all()
        for a, b in zip(left.questions, right.questions, strict=True)
    )
    tensors = left.tensors.keys() == right.tensors.keys() and all(
        torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors
    )
    prefixes = left.prefix_ids.tolist() == right.prefix_ids.tolist()
    types = left.prefix_types.tolist() == right.prefix_types.tolist()
    return questions_equal and tensors and prefixes and types and left.image_tokens == right.image_tokens


def work(cache: DataCache) -> tuple[int, int]:
    """Images processed and images whose questions were tokenised."""
    return cache.processed_images, cache.tokenised_groups


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava", "gemma3"])
def test_what_is_read_is_what_the_encoder_makes(family: str, tmp_path: Path) -> None:
    first, cold = prepare(tmp_path, samples(), family)
    second, warm = prepare(tmp_path, samples(), family)
    assert (work(cold), work(warm)) == ((4, 4), (0, 0))
    _, processor = build(family)
    encoder = Encoder(processor, PROMPT)
    for index in range(len(SIZES)):
        fresh = encoder.encode(samples()[3 * index : 3 * index + 3])
        assert equal(first[index], fresh) and equal(second[index], fresh)
    assert first.lengths == second.lengths


def test_pixels_take_a_byte_each(tmp_path: Path) -> None:
    data, _ = prepare(tmp_path, samples())
    raw = sum(value.numel() * value.element_size() for group in data for value in group.tensors.values())
    stored = sum(path.stat().st_size for path in (tmp_path / "images").rglob("*.safetensors"))
    assert stored < raw / 7


def test_a_changed_question_processes_no_image(tmp_path: Path) -> None:
    prepare(tmp_path, samples())
    changed = [replace(samples()[0], question="Something else?"), *samples()[1:]]
    data, cache = prepare(tmp_path, changed)
    assert work(cache) == (0, 1)
    assert "Something else?" in data.encoder.tokenizer.decode(data[0].questions[0].prompt_ids)


def other_template(processor: Any) -> None:
    processor.chat_template = processor.chat_template.replace("assistant", "helper")


def other_normalisation(processor: Any) -> None:
    processor.image_processor.image_std = [0.3, 0.3, 0.3]


def another_token(processor: Any) -> None:
    processor.tokenizer.add_tokens(["how many"])


@pytest.mark.parametrize(
    ("prompt", "change", "expected"),
    [
        (replace(PROMPT, template="{question}\nSay it:"), None, (0, 4)),
        (replace(PROMPT, system="Be brief."), None, (0, 4)),
        (replace(PROMPT, max_pixels=28 * 28 * 8), None, (4, 4)),
        (replace(PROMPT, max_new_tokens=7), None, (0, 0)),
        (PROMPT, other_template, (0, 4)),
        (PROMPT, other_normalisation, (4, 4)),
        (PROMPT, another_token, (0, 4)),
    ],
)
def test_a_changed_setting_reads_nothing_stale(
    tmp_path: Path, prompt: PromptSettings, change: Callable[[Any], None] | None, expected: tuple[int, int]
) -> None:
    prepare(tmp_path, samples())
    _, cache = prepare(tmp_path, samples(), prompt=prompt, change=change or (lambda processor: None))
    assert work(cache) == expected


def test_what_is_damaged_is_seen_when_it_is_read_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = prepare(tmp_path, samples())
    before = first[1]
    (shard,) = (tmp_path / "images").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.unlink()
    shard.write_bytes(data)
    second, cache = prepare(tmp_path, samples())
    assert work(cache) == (0, 0) and "damaged" not in capsys.readouterr().err  # a start reads no image
    assert all(equal(second[index], first[index]) for index in range(len(SIZES))) and equal(second[1], before)
    assert capsys.readouterr().err.count("checksum") == 1
    third, again = prepare(tmp_path, samples())
    assert work(again) == (4, 0)
    assert equal(third[1], before) and not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    data, _ = prepare(blocked, samples())
    assert capsys.readouterr().err.count("prepared data cannot be stored") == 1
    assert len(data) == 4 and "pixel_values" in data[0].tensors


def test_an_unreadable_image_is_left_out(tmp_path: Path) -> None:
    broken = replace(samples()[0], id="broken", images=(ImageRef.from_bytes(b"no image", "broken.png"),))

    def vanished() -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    gone = replace(broken, id="gone", images=(ImageRef("0" * 64, "gone.png", vanished),))
    for _ in range(2):
        data, _ = prepare(tmp_path, [broken, *samples(), gone])
        assert [item.id for item in data.left_out] == ["broken", "gone"] and len(data) == 4
        assert "gone.png" in data.left_out[1].detail


def test_two_processes_may_fill_one_cache(warm: Warm, tmp_path: Path) -> None:
    script, folder = tmp_path / "fill.py", tmp_path / "cache"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.invariant.test_cache import prepare, samples\n"
        "data, _ = prepare(Path(sys.argv[1]), samples())\nassert len(data) == 4"
    )
    started = [warm.start([str(folder)], tmp_path / name, script=script) for name in ("one", "other")]
    assert [process.wait(240) for process in started] == [0, 0], (tmp_path / "one").read_text()
    data, cache = prepare(folder, samples())
    assert work(cache) == (0, 0) and "pixel_values" in data[3].tensors


def test_no_packing_puts_one_bundle_into_each_pass() -> None:
    lengths = tuple(GroupLengths(20, (5,) * count, (2,) * count) for count in (1, 4, 2, 6, 3))
    planner = EpochPlanner(lengths, 7, 500, 2, seed=0)
    for step, plain in zip(planner.epoch(0), replace(planner, packing=False).epoch(0), strict=True):
        assert all(len(pack) <= 1 for packs in plain.ranks for pack in packs)
        assert len({len(packs) for packs in plain.ranks}) == 1
        asked = [
            sorted((b.group, q) for packs in ranks for pack in packs for b in pack for q in b.questions)
            for ranks in (step.ranks, plain.ranks)
        ]
        assert asked[0] == asked[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and a JSONL of questions with their images."""
    folder = tmp_path_factory.mktemp("job")
    save("qwen2_5_vl", folder / "base")
    rows = []
    for number in range(10):
        asked = questions(number, 3, SIZES[number % len(SIZES)])
        (folder / f"{number}.png").write_bytes(asked[0].images[0].load())
        rows += [{"image": f"{number}.png", "question": s.question, "answer": s.target} for s in asked]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(job: Path, name: str, **engine: Any) -> tuple[list[float], dict[str, Any]]:
    """Train through the whole run; returns the losses of every step and evaluation, and the record of the engine."""
    from vlm_sft.data.engine_options import EngineOptions
    from vlm_sft.planning.options import TrainOptions
    from vlm_sft.train.run import train

    overrides: dict[str, object] = {
        "num_train_epochs": 2,
        "global_batch_size": 8,
        "logging_steps": 1,
        "lora_dropout": 0.1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    output = job / name
    options = EngineOptions(cache_dir=job / "cache", **engine)
    train(
        TrainOptions(
            output_dir=output,
            overrides=overrides,
            base_model=str(job / "base"),
            dataset=str(job / "data.jsonl"),
            eval_benchmarks="none",
            engine=options,
        )
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row[key] for row in rows for key in ("loss", "eval_loss") if key in row]
    return losses, json.loads((output / "run.json").read_text())["engine"]


def test_every_escape_hatch_gives_the_same_losses(job: Path) -> None:
    plain, cold = trained(job, "kept", feature_cache=10**9)
    # One of the ten images is held out for a test that this run does not make.
    assert cold["processed_images"] == 9 and cold["feature_cache"]["training"]["computed"] == 9
    assert cold["training_tower"] == {"calls": 0, "images": 0}
    again, warm = trained(job, "again", feature_cache=10**9)
    assert warm["processed_images"] == warm["tokenised_images"] == warm["feature_cache"]["training"]["computed"] == 0
    assert again == plain
    hatches: list[dict[str, Any]] = [
        {"feature_cache": "off"},
        {"feature_cache": "off", "prepared_cache": False},
        {"share_images": False},
        {"packing": False},
        {"packing": False, "share_images": False, "feature_cache": "off", "prepared_cache": False},
    ]
    for number, hatch in enumerate(hatches):
        losses, facts = trained(job, f"hatch{number}", **({"feature_cache": 10**9} | hatch))
        assert losses == pytest.approx(plain, rel=1e-6), hatch
        assert (facts["training_tower"]["calls"] > 0) == (hatch.get("feature_cache") == "off"), hatch
        assert all(facts[name] == value for name, value in hatch.items() if name != "feature_cache")

"""Run folders as a training leaves them, and a reader of the pages that are made of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlm_sft.common import artifacts

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "use"}


class Page(HTMLParser):
    """Elements with their attributes, the visible text, and a check that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"double attribute in {tag}: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.scripts.append(data)
        elif not self.stack or self.stack[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def held(self) -> dict[str, Any]:
        """What the page's script reads."""
        kinds = [script.get("type", "") for script in self.all("script")]
        return json.loads(self.scripts[kinds.index("application/json")])

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def chart(path: Path, number: int, side: tuple[int, int] = (900, 600)) -> None:
    picture = Image.new("RGB", side, "white")
    draw = ImageDraw.Draw(picture)
    for bar in range(5):
        height = (number * 37 + bar * 91) % (side[1] - 80) + 40
        left, bottom = 60 + bar * 160, side[1] - 30
        draw.rectangle([left, bottom - height, left + 100, bottom], fill=(40, 90 + bar * 30, 180))
    draw.text((20, 20), path.stem, fill="black", font_size=40)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def scores(n: int, base: float, tuned: float, synthetic: bool, splits: dict[str, Any]) -> dict[str, Any]:
    return {
        "n": n,
        "metric": "relaxed accuracy",
        "synthetic": synthetic,
        "base": {"accuracy": base, "interval": [base - 0.03, base + 0.03], "seconds": 63.2},
        "tuned": {"accuracy": tuned, "interval": [tuned - 0.03, tuned + 0.03], "seconds": 61.0},
        "difference": tuned - base,
        "difference_interval": [tuned - base - 0.02, tuned - base + 0.02],
        "p_value": 0.0004,
        "verdict": "better",
        "splits": splits,
    }


def predictions(folder: Path, benchmark: str, count: int) -> None:
    for side in ("base", "tuned"):
        rows = []
        for i in range(count):
            right = (i % 4 in (1, 2)) if side == "base" else (i % 4 in (0, 2))
            rows.append(
                {
                    "id": f"{benchmark}/test/{i:06d}",
                    "image": f"images/{benchmark}{i // 2}.png",
                    "split": "human",
                    "question": f"What is the value of bar {i}?",
                    "prediction": str(i) if right else f"about {i + 7}",
                    "answers": [str(i)],
                    "score": 1.0 if right else 0.0,
                    "question_type": "retrieval",
                }
            )
        artifacts.write_jsonl(folder / "evaluation" / side / benchmark / artifacts.PREDICTIONS, rows)
    for i in range((count + 1) // 2):
        chart(folder / "evaluation" / "images" / f"{benchmark}{i}.png", i)


def record(status: str = "finished") -> dict[str, Any]:
    return {
        "schema": 1,
        "status": status,
        "started": "2026-01-02T10:00:00+00:00",
        "finished": "2026-01-02T10:04:05+00:00",
        "command": ["vlm-sft", "train", "--sft_config", "configs/sft_config_best.json", "--output_dir", "outputs/a b"],
        "wall_seconds": 245.3,
        "seconds": {"load": 4.1, "train": 117.0, "evaluate": 124.2},
        "output_dir": "outputs/a b",
        "base_model": "pocket",
        "datasets": ["easy_vqa", "demo_charts"],
        "device": "cpu",
        "world_size": 1,
        "parallel": "single",
        "attention": "sdpa",
        "dtype": "float32",
        "lora": {
            "r": 16,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "matched_modules": 18,
            "trainable_parameters": 120_000,
            "total_parameters": 11_200_000,
        },
        "steps": 120,
        "questions_seen": 7680,
        "best": {"step": 90, "metric": "eval_loss", "value": 0.62},
        "bytes": {"adapter": 491_520, "checkpoints": 4_194_304, "logs": 20_480},
        "peak_memory_bytes": 1_503_238_553,
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
        "git": {"hash": "0123abcd" * 5, "dirty": True},
        "notes": ["FlashAttention is not installed: SDPA ran."],
    }


def make_run(folder: Path, steps: int = 120) -> Path:
    """A finished run with two benchmarks, 40 predictions and 20 pictures."""
    artifacts.write_json(folder / artifacts.RUN, record())
    artifacts.write_json(folder / artifacts.RECIPE, {"learning_rate": 4e-5, "num_train_epochs": 6, "seed": 42})
    part = {
        "samples": 7680,
        "images": 4000,
        "supervised_tokens": 15_900,
        "image_tokens": 256_000,
        "prompt_tokens": 99_000,
        "questions_per_image": {"1": 2000, "2": 1000, "4": 920},
        "by_dataset": {"easy_vqa": 5120, "demo_charts": 2560},
        "synthetic": ["demo_charts"],
    }
    artifacts.write_json(
        folder / artifacts.DATA,
        {"train": part, "eval": {**part, "samples": 640, "images": 320}, "left_out": {"empty answer": 3}},
    )
    artifacts.write_jsonl(
        folder / artifacts.LEFT_OUT,
        [{"id": f"easy_vqa/train/{i}", "reason": "empty answer", "detail": f"row {i}"} for i in range(3)],
    )
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "epoch": step / steps,
                "time": 1.0 * step,
                "grad_norm": 0.2,
                "loss": 2.4 * 0.98**step + 0.5 + 0.05 * ((step * 7) % 5),
                "learning_rate": 4e-5 * (1 - step / steps),
            }
        )
        if step % 30 == 0:
            rows.append(
                {"step": step, "epoch": step / steps, "time": 1.0 * step, "eval_loss": 0.6 + abs(step - 90) / 100}
            )
    artifacts.write_jsonl(folder / artifacts.METRICS, rows)
    artifacts.write_json(
        folder / artifacts.RESULTS,
        {
            "schema": 1,
            "benchmarks": {
                "easy_vqa": scores(1000, 0.61, 0.764, False, {}),
                "demo_charts": scores(
                    500,
                    0.22,
                    0.315,
                    True,
                    {
                        "human": {"n": 250, "base": 0.2, "tuned": 0.26},
                        "augmented": {"n": 250, "base": 0.24, "tuned": 0.37},
                    },
                ),
            },
        },
    )
    for benchmark in ("easy_vqa", "demo_charts"):
        predictions(folder, benchmark, 20)
    return folder


def runs_only_its_own_scripts(page: Page) -> bool:
    """Whether the policy names the hash of every script in the page, and allows nothing else."""
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    kinds = [script.get("type", "") for script in page.all("script")]
    own = [text for text, kind in zip(page.scripts, kinds, strict=True) if not kind]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return kinds.count("application/json") == 1 and policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    )

"""Synthetic samples: deterministic, stable under their number, disjoint between splits."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from tests.pictures import chart_spec
from vlm_sft.common.errors import DataError
from vlm_sft.data.demo.generate import KINDS, demo_samples, render_png, spec_key
from vlm_sft.data.sources.splits import SPLITS

DIGEST = """
import hashlib, sys
from vlm_sft.data.demo.generate import demo_samples
digest = hashlib.sha256()
for sample in demo_samples(sys.argv[1], "test", 60, seed=3):
    digest.update(repr((sample, sorted(sample.metadata.items()))).encode() + sample.images[0].load())
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
sys.stdout.write(digest.hexdigest())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_with_another_hash_seed_draws_the_same_bytes(kind):
    digests = []
    for hash_seed in ("1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST, kind], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1] and len(digests[0]) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_samples_are_the_first_of_more(kind):
    assert demo_samples(kind, "train", 100) == demo_samples(kind, "train", 1000)[:100]
    assert demo_samples(kind, "train", 0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_splits_and_seeds_share_nothing(kind):
    sets = [demo_samples(kind, split, 800) for split in SPLITS] + [demo_samples(kind, "train", 800, seed=1)]
    keys = [{sample.image_key for sample in one} for one in sets]
    assert sum(map(len, keys)) == len(set().union(*keys))
    ids = [sample.id for one in sets for sample in one]
    assert len(set(ids)) == len(ids)
    assert sets[0][17].id == f"{kind}/train/000017"


@pytest.mark.parametrize(("kind", "allowed"), [("demo_charts", {3, 4, 5, 6}), ("demo_text", {2, 3, 4})])
def test_questions_for_each_picture(kind, allowed):
    samples = demo_samples(kind, "train", 1200)
    per_picture = Counter(sample.image_key for sample in samples)
    *whole, last = per_picture.values()
    assert set(whole) == allowed and last <= max(allowed)
    share = len(whole) / len(allowed)
    assert all(0.7 * share < count < 1.3 * share for count in Counter(whole).values())
    # Questions of one picture follow each other and share one reference.
    order = [sample.image_key for sample in samples]
    assert sum(one != other for one, other in zip(order, order[1:], strict=False)) == len(per_picture) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_samples_keep_the_contract(kind):
    for sample in demo_samples(kind, "validation", 200):
        image = sample.images[0]
        with Image.open(io.BytesIO(image.load())) as picture:
            assert picture.format == "PNG" and picture.mode == "RGB"
            assert picture.size == (image.width, image.height)
        assert sample.dataset == kind and sample.target in sample.answers
        assert sample.metadata["synthetic"] is True and "synthetic" in image.source
        assert sample.split in (("augmented", "human") if kind == "demo_charts" else ("",))
        expected = (
            {"question_type", "answer_type", "chart_type"} if kind == "demo_charts" else {"question_type", "sign_type"}
        )
        assert set(sample.metadata) == expected | {"synthetic"}


def test_a_key_names_the_specification_and_equal_keys_mean_equal_bytes():
    sample = demo_samples("demo_charts", "test", 1)[0]
    spec = chart_spec("test", 0)
    assert sample.image_key == spec_key(spec)
    assert sample.images[0].load() == render_png(spec)
    render_png.cache_clear()
    assert hashlib.sha256(sample.images[0].load()).digest() == hashlib.sha256(render_png.__wrapped__(spec)).digest()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_travel_to_worker_processes(kind):
    sample = demo_samples(kind, "train", 1)[0]
    copy = pickle.loads(pickle.dumps(sample))
    assert copy == sample and copy.images[0].load() == sample.images[0].load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo_maps", "train", 1), "demo_maps.*demo_charts, demo_text"),
        (("demo_text", "dev", 1), "no split 'dev'.*train, validation, test"),
        (("demo_text", "test", -1), "-1 questions"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(DataError, match="(?s)" + message):
        demo_samples(*arguments)

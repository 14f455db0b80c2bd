"""What all tests share: a cache of their own, and one warm process a worker.

No test writes into the cache of whoever runs it: what it learns about tiny models would change their forecasts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.faults.injection import can_inject, layer
from tests.processes import Warm, measure_briefly
from vlm_sft.data.cache.directory import VARIABLE

# Families in which nothing is new that no other family has: all but one test of exactness is slow.
REPEATING = {
    "cosmos3_omni",
    "deepseek_ocr2",
    "deepseek_vl",
    "exaone4_5",
    "fast_vlm",
    "glm4v_moe",
    "glmga",
    "granite_docling",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "janus",
    "lfm3_vl",
    "lighton_ocr",
    "llava_next",
    "llava_next_video",
    "minicpm_ocr",
    "minicpmv4_7",
    "ovis2",
    "paddleocr_vl",
    "perception_lm",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "video_llama_3",
    "video_llava",
    "vipllava",
}
_FOLDER = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected, so that every process which is started has it."""
    # No test's numbers hang on a measurement: `--bf16 auto` finds a processor without bfloat16, unless a test says so.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    # No test asks the Hub, whose silence is waited for half a minute each time; those about it say so.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # PyTorch 2.8 starts compilers once bitsandbytes is imported; nothing is compiled here.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config.stash[_FOLDER] = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="vlm_sft_tests.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that repeat for one more family what others have shown, and those that need newer libraries."""
    from tests.older_versions import lacking  # loads families, which the process that starts the workers need not

    measure_briefly()
    for item in items:
        if reason := lacking(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))
        family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
        if family in REPEATING and item.name != f"test_packs_of_one_to_ten_questions[{family}-blockwise-float32]":
            item.add_marker("slow")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it again."""
    shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process with the libraries loaded, of which commands and runs are forked; started when first needed.

    It has the layer of injected faults, which does nothing without rules.
    """
    server = Warm(layer(tmp_path_factory.mktemp("layer")) if can_inject() else None)
    yield server
    server.close()

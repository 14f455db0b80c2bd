"""What an export is asked for, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm_sft.common.idle import Idle
from vlm_sft.common.options import option
from vlm_sft.evaluate.options import ALLOW_OTHER_BASE

AUTO = "auto"


@dataclass(frozen=True)
class ExportOptions:
    """The command line of one export.

    Attributes:
        adapter: folder of the adapter: a run or a checkpoint.
        output_dir: the new folder.
    """

    adapter: Path
    output_dir: Path
    merge: bool = option(False, "merge the adapter into the base's weights: a complete model")
    base_model: str | None = option(
        None, "Hub id, folder, or 'pocket' (default: the one that the adapter names)", "MODEL"
    )
    allow_other_base: bool = option(False, ALLOW_OTHER_BASE)
    dtype: str = option(
        AUTO,
        "number format of merged weights (default: that of the base; float32 where that rounds the update away)",
        choices=(AUTO, "float32", "bfloat16"),
    )
    questions: int = option(8, "questions that the export and the adapter are compared on (default: %(default)s)", "N")
    peft_only: bool = option(False, "export an adapter that vLLM does not load (DoRA, trained projector)")
    repository: str | None = option(
        None, "upload the result to the Hugging Face Hub", "OWNER/NAME", names=("--push_to_hub",)
    )
    public: bool = option(False, "a new repository is public (default: private)")


IDLE = (
    Idle(
        ("dtype",),
        lambda o: not o.merge,
        "without --merge: an adapter keeps its numbers",
        "add --merge, or leave it out",
    ),
    Idle(("peft_only",), lambda o: o.merge, "on a merged model, which vLLM loads", "leave it out"),
    Idle(("public",), lambda o: o.repository is None, "without --push_to_hub", "add --push_to_hub, or leave it out"),
)

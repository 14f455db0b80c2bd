"""Files of models, opened by transformers: failures become one message, and the Hub is asked once a command."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig

from vlm_sft.common.errors import ModelError
from vlm_sft.common.hub_answers import ANSWERS


def model_config(path: str, name: str = "") -> Any:
    """The configuration of a model.

    Args:
        path: a folder, or a Hub id, whose answer is kept until the command ends.
        name: as the user names it; "" for `path`.

    Raises:
        ModelError: it cannot be opened.
    """
    if Path(path).is_dir():
        return opened(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), name or path)
    if path not in ANSWERS:
        ANSWERS[path] = opened(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), name or path)
    return copy.deepcopy(ANSWERS[path])  # who has it may change it


def _is_offline(error: BaseException) -> bool:
    """Whether a loader failed because the Hub could not be reached; older libraries say so only in the reasons of it.

    huggingface_hub 1.5 closes its client before it repeats a request that got no connection.
    """
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, LocalEntryNotFoundError) or "client has been closed" in str(reason):
            return True
        reason = reason.__cause__ or reason.__context__
    return any(word in str(error) for word in ("connect", "offline", "resolve", "internet", "Connection"))


def opened(load: Callable[[], Any], name: str) -> Any:
    """Run a loader of transformers and turn its failures into one message.

    Args:
        load: the loader.
        name: of the model. Where the Hub could not be reached for it, no other loader of this command asks again.

    Raises:
        ModelError: the loader failed.
    """
    unreachable = f"unreachable: {name}"
    try:
        if unreachable in ANSWERS:
            raise ANSWERS[unreachable]
        return load()
    except Exception as error:  # what a broken folder raises in transformers and tokenizers can be anything
        text = str(error)
        if _is_offline(error) and not Path(name).exists():
            ANSWERS[unreachable] = error
            raise ModelError(
                f"--base_model {name}: the Hugging Face Hub cannot be reached and the model is not in the local cache",
                "pass a folder that holds the model (--base_model /path/to/model), or 'pocket' for the embedded one",
            ) from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"--base_model {name}: it contains Python code, which is never run",
                "use a model of a family that transformers itself has",
            ) from error
        lines = text.strip().splitlines() or [type(error).__name__]
        first_line = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
        if not isinstance(error, OSError | ValueError):  # their texts are written for users
            first_line = f"{type(error).__name__}: {first_line}"
        what = f"--base_model {name} cannot be opened: {first_line}"
        raise ModelError(what, "check the name or the folder") from error

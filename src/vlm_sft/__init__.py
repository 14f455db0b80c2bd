"""vlm-sft: fine-tune vision-language models to answer questions about images.

The names of `__all__` are the Python API (docs/API.md). Each is imported when it is first used, so that
`import vlm_sft` loads no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_sft.api.exchange import check_data as check_data
    from vlm_sft.api.exchange import export_data as export_data
    from vlm_sft.api.exchange import import_data as import_data
    from vlm_sft.api.finished import Run as Run
    from vlm_sft.api.finished import open_run as open_run
    from vlm_sft.api.finished import verify as verify
    from vlm_sft.api.models import ask as ask
    from vlm_sft.api.models import demo as demo
    from vlm_sft.api.planning import plan as plan
    from vlm_sft.api.planning import recommend as recommend
    from vlm_sft.api.scoring import compare as compare
    from vlm_sft.api.scoring import evaluate_model as evaluate_model
    from vlm_sft.api.scoring import score as score
    from vlm_sft.api.sweeping import sweep as sweep
    from vlm_sft.api.training import finetune as finetune
    from vlm_sft.common.errors import VlmSftError as VlmSftError
    from vlm_sft.recipe.load import load_recipe as load_recipe

__version__ = "0.1.0"

# Where each name comes from.
_PLACES = {
    "finetune": "api.training",
    "plan": "api.planning",
    "sweep": "api.sweeping",
    "evaluate_model": "api.scoring",
    "score": "api.scoring",
    "compare": "api.scoring",
    "recommend": "api.planning",
    "verify": "api.finished",
    "demo": "api.models",
    "check_data": "api.exchange",
    "import_data": "api.exchange",
    "export_data": "api.exchange",
    "open_run": "api.finished",
    "Run": "api.finished",
    "ask": "api.models",
    "load_recipe": "recipe.load",
    "VlmSftError": "common.errors",
}

__all__ = [*_PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The API, for completion."""
    return sorted({*globals(), *_PLACES})

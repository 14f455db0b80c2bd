"""Whether what `report_to` names can be used here, found out without importing it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

from vlm_sft.common.errors import RecipeError

EXTRAS = ("wandb", "mlflow", "trackio")  # that pyproject.toml has for trackers
_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {  # by tracker: what it imports, what pip calls that
    "tensorboard": (("tensorboard",), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
    "trackio": (("trackio",), "trackio"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "swanlab": (("swanlab",), "swanlab"),
    "clearml": (("clearml",), "clearml"),
    "dvclive": (("dvclive",), "dvclive"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "azure_ml": (("azureml.core",), "azureml-core"),
    "dagshub": (("dagshub", "mlflow"), "dagshub mlflow"),
    "flyte": (("flytekit",), "flytekit"),
    "neptune": (("neptune",), "neptune"),
}
# Variables that turn an integration of transformers off, or that it cannot do without.
_FORBIDDEN = {"mlflow": "DISABLE_MLFLOW_INTEGRATION", "kubeflow": "DISABLE_KUBEFLOW_INTEGRATION"}
_NEEDED = {"dagshub": "MLFLOW_TRACKING_URI", "kubeflow": "KUBEFLOW_TRAINER_SERVER_URL"}


def check_trackers(names: Iterable[str]) -> None:
    """Make sure that every tracker can be used, before anything heavy starts.

    Args:
        names: the recipe's `report_to`.

    Raises:
        RecipeError: packages are missing, or variables of the environment stand against it; all of them together.
    """
    mistakes, fixes = [], []
    for name in names:
        modules, package = _PACKAGES.get(name, ((), ""))
        missing = [module for module in modules if not _installed(module)]
        if missing:
            mistakes.append(f"report_to {name}: the package {missing[0]} is not installed")
            fixes.append(f"pip install 'vlm-sft[{name}]'" if name in EXTRAS else f"pip install {package}")
        if os.environ.get(variable := _FORBIDDEN.get(name, ""), "").upper() == "TRUE":
            mistakes.append(f"report_to {name}: the environment says {variable}=TRUE")
            fixes.append(f"unset {variable}")
        if (variable := _NEEDED.get(name, "")) and variable not in os.environ:
            mistakes.append(f"report_to {name}: {variable} is not set in the environment")
            fixes.append(f"set {variable}")
    if mistakes:
        raise RecipeError("; ".join(mistakes), f"{'; '.join(fixes)}; or take it out of --report_to")


def _installed(module: str) -> bool:
    """Whether a real package of that name is there: a folder such as ./wandb, full of runs, looks like one too."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None

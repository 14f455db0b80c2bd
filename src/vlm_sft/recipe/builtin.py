"""The five recipes inside the package, by name.

`configs/` of the repository holds the same files, to read and to copy; a test holds the two folders against each other.
"""

from __future__ import annotations

from pathlib import Path

FILES = Path(__file__).parent / "files"
# Names of the recipes by the stems of their files.
RECIPES = {
    "sft_config_smoketest": "smoketest",
    "sft_config_1epoch": "1epoch",
    "sft_config": "2epoch",
    "sft_config_5epoch": "5epoch",
    "sft_config_best": "best",
}


def locate_recipe(path: str | Path) -> Path:
    """The file that `--sft_config` means.

    Args:
        path: a file, or the name of a recipe of the package: smoketest, 1epoch, 2epoch, 5epoch, best.

    Returns:
        The path as it was given, unless it is one of the names and no file is called so.
    """
    path = Path(path)
    stems = {name: stem for stem, name in RECIPES.items()}
    return path if str(path) not in stems or path.is_file() else FILES / f"{stems[str(path)]}.json"


def recipe_name(path: str | Path) -> str:
    """A recipe as a person calls it: the name of one of the package, else its path.

    Args:
        path: as `locate_recipe` returns it.
    """
    path = Path(path)
    return f"the recipe {RECIPES[path.stem]}" if path.parent == FILES and path.stem in RECIPES else str(path)

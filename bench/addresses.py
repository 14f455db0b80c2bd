"""Where the project lives, in the places that name it: README's line on notebooks, and the first cell of each notebook.

    python bench/addresses.py

`[project.urls] Repository` in pyproject.toml decides. With an address on GitHub, README gets badges that open the
notebooks on Colab and Kaggle. Without one it says how to upload them, and their first cell installs from a wheel or a
copy of the repository.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

from common import ROOT, with_block
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

README = ROOT / "README.md"
NOTEBOOKS = {"first_run": "first run", "own_data": "your own data"}
BRANCH = "main"
CELL = "# Install"  # how the cell begins that is written

_COLAB = "https://colab.research.google.com"
_KAGGLE = "https://kaggle.com"
_UPLOAD = (
    "Colab opens them with File > Upload notebook, Kaggle with File > Import Notebook; "
    "their first cell names the file to add."
)
_INSTALL = """\
# Install vlm-sft if it is missing: from a wheel next to this notebook, or from the repository.
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("vlm_sft") is None:
    wheels, checkout = sorted(Path().glob("vlm_sft-*.whl")), Path("..", "src", "vlm_sft").is_dir()
    source = str(wheels[-1]) if wheels else ".." if checkout else "{address}"
    if not source:
        raise FileNotFoundError(
            "no vlm_sft-*.whl next to this notebook. In a copy of the repository run `pip wheel --no-deps .`, "
            "upload the wheel here (Colab: the folder icon on the left), and run this cell again"
        )
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
    importlib.invalidate_caches()"""


def repository() -> str:
    """The address of the repository without a slash at its end; "" while pyproject.toml names none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", "")).removesuffix("/").removesuffix(".git")


def line(address: str) -> str:
    """README's line on the notebooks.

    Args:
        address: of the repository, or "".
    """
    path = address.removeprefix("https://github.com/")
    links = {name: f"[{title}](notebooks/{name}.ipynb)" for name, title in NOTEBOOKS.items()}
    if path == address:  # none, or one that Colab and Kaggle cannot open
        return f"Notebooks: {', '.join(links.values())}. {_UPLOAD}"
    return "Notebooks: " + ", ".join(f"{link} {_badges(address, path, name)}" for name, link in links.items())


def _badges(address: str, path: str, name: str) -> str:
    file = f"blob/{BRANCH}/notebooks/{name}.ipynb"
    colab = f"[![Colab]({_COLAB}/assets/colab-badge.svg)]({_COLAB}/github/{path}/{file})"
    kaggle = f"[![Kaggle]({_KAGGLE}/static/images/open-in-kaggle.svg)]({_KAGGLE}/kernels/welcome?src={address}/{file})"
    return f"{colab} {kaggle}"


def cell(address: str) -> str:
    """The source of a notebook's first cell.

    Args:
        address: of the repository, or "".
    """
    return _INSTALL.format(address=address and f"git+{address}")


def with_cell(notebook: str, source: str) -> str:
    """A notebook with another first cell.

    Args:
        notebook: its JSON text.
        source: of the cell.
    """
    content = json.loads(notebook)
    (first,) = (one for one in content["cells"] if "".join(one["source"]).startswith(CELL))
    first["source"] = source.splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def pages(address: str) -> dict[Path, str]:
    """Every file that depends on the address, with its text.

    Args:
        address: of the repository, or "".
    """
    texts = {README: with_block(README.read_text(encoding="utf-8"), "addresses", line(address))}
    for name in NOTEBOOKS:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        texts[path] = with_cell(path.read_text(encoding="utf-8"), cell(address))
    return texts


def main() -> int:
    """Write them."""
    for path, text in pages(repository()).items():
        artifacts.write_text_atomic(path, text)
        say(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

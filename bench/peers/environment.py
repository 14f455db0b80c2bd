"""One Python environment a peer, outside the repository, made once.

An environment sees the packages of the running one (torch and torchvision: 5 GB that need not be there four times)
behind its own, so a peer has the versions that it asks for wherever they differ.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

DEFAULT_FOLDER = Path.home() / ".cache" / "vlm-sft-bench"
REQUIREMENTS = {
    "trl": ["trl==1.16.0", "peft", "datasets"],
    "llamafactory": ["llamafactory==0.9.5"],
    "msswift": ["ms-swift==4.6.0", "qwen_vl_utils"],
}
# LLaMA-Factory imports torchaudio for sound, which is not trained on here. A build of it for another torch refuses to
# be imported, and one for this torch may not exist, so an empty module stands in for it.
EMPTY_MODULES = {"llamafactory": ["torchaudio"]}
DONE = "made.txt"


def wanted(peer: str) -> str:
    """What an environment is made of: when this text changes it is made again."""
    return "\n".join([*REQUIREMENTS[peer], *EMPTY_MODULES.get(peer, []), sysconfig.get_path("purelib"), ""])


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment."""
    return folder / peer / "bin" / "python"


def ready(peer: str, folder: Path) -> bool:
    """Whether the environment of a peer is there, complete and as asked for."""
    done = folder / peer / DONE
    return done.is_file() and done.read_text(encoding="utf-8") == wanted(peer)


def make(peer: str, folder: Path) -> Path:
    """Make the environment of a peer where it is missing.

    Args:
        peer: a key of `REQUIREMENTS`.
        folder: where the environments lie.

    Returns:
        Its interpreter.

    Raises:
        subprocess.CalledProcessError: pip failed; its output went to the terminal.
    """
    python = python_of(peer, folder)
    if ready(peer, folder):
        return python
    place = folder / peer
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
    packages = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, *REQUIREMENTS[peer]], check=True)
    for name in EMPTY_MODULES.get(peer, []):
        shutil.rmtree(packages / name, ignore_errors=True)  # a package would go before the module
        (packages / f"{name}.py").write_text('"""Stands in for a package that is not used."""\n', encoding="utf-8")
    (place / DONE).write_text(wanted(peer), encoding="utf-8")
    return python

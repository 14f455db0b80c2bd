"""`vlm-sft completion`: bash itself is asked what it would offer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vlm_sft.cli.main import main
from vlm_sft.cli.parser import VERBS

ASK = '; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vlm_sft; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def offered(script: str, folder: Path, *words: str) -> set[str]:
    """What bash offers in place of the last word."""
    (folder / "script.bash").write_text(script, encoding="utf-8")
    command = ["bash", "-c", "source script.bash" + ASK, "bash", "vlm-sft", *words]
    return set(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_verbs_flags_and_values(script: str, tmp_path: Path) -> None:
    assert offered(script, tmp_path, "") == set(VERBS)
    assert offered(script, tmp_path, "train", "--lora_") == {"--lora_r", "--lora_alpha", "--lora_dropout"}
    assert offered(script, tmp_path, "train", "--optim", "adamw") == {"adamw_torch_fused", "adamw_torch", "adamw_8bit"}
    assert offered(script, tmp_path, "train", "--bf16", "") == {"auto", "true", "false"}
    assert offered(script, tmp_path, "data", "cache", "") == {"list", "clear"}
    assert offered(script, tmp_path, "data", "cache", "clear", "--") == {
        "--help",
        "--older_than",
        "--all",
        "--cache_dir",
    }
    assert offered(script, tmp_path, "data", "check", "--split", "te") == {"test"}
    assert "--benchmark" not in offered(script, tmp_path, "train", "--b")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_files_where_a_value_is_open(script: str, tmp_path: Path) -> None:
    (tmp_path / "my_recipe.json").touch()
    assert offered(script, tmp_path, "train", "--sft_config", "my") == {"my_recipe.json"}


def test_fish_and_zsh_get_the_same_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    assert zsh.startswith("autoload -U +X bashcompinit && bashcompinit\n") and "--learning_rate" in zsh
    assert main(["completion", "fish"]) == 0
    fish = capsys.readouterr().out
    line = (
        "complete -c vlm-sft -n '__fish_seen_subcommand_from data; and __fish_seen_subcommand_from check' -l split -x"
    )
    assert line in fish and "%(default)s" not in fish
    assert all(entry.startswith("complete -c vlm-sft") for entry in fish.splitlines())

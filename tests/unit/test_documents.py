"""Every command in the documents is one that the real parser takes; what is marked as run is run elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from scripts import draw_image_sharing
from tests.documents import ROOT, arguments_of, blocks, our_lines, pages, parse
from vlm_sft.cli.main import main
from vlm_sft.recipe.load import overrides_from, read_recipe

MARKED = {"FIRST_RUN.md", "YOUR_DATA.md", "CHOOSING_A_RECIPE.md", "EVALUATING.md", "TROUBLESHOOTING.md", "API.md"}
VERBS_WITH_RECIPE = ("train", "plan", "recommend")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_command_is_one_that_the_parser_takes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in our_lines(page):
        try:
            args = parse(words)
        except SystemExit as end:
            assert end.code == 0, f"{page.name}: {line}\n{capsys.readouterr().err}"
            continue
        if args.verb not in VERBS_WITH_RECIPE:
            continue
        read_recipe(None, overrides_from(args))
        if args.sft_config is not None and args.sft_config.suffix:
            assert (ROOT / args.sft_config).is_file(), line


def test_the_parser_would_notice_a_wrong_flag() -> None:
    for line in ("vlm-sft train --output_dir a --lora_depth 3", "torchrun -m vlm_sft evaluate", "vlm-sft ask x.png"):
        words = arguments_of(line)
        assert words is not None
        with pytest.raises(SystemExit):
            parse(words)
    launched = "OMP_NUM_THREADS=1 deepspeed --num_gpus=2 src/train_vlm_sft.py --output_dir a  # two ranks"
    assert arguments_of(launched) == ["train", "--output_dir", "a"]
    assert arguments_of("deepspeed --module vlm_sft eval --limit 3") == ["eval", "--limit", "3"]
    assert arguments_of("vllm serve outputs/merged") is None


def test_the_guides_hold_commands_that_are_run() -> None:
    marked = {page.name for page in pages() if any(block.mark == "run" for block in blocks(page))}
    assert marked >= MARKED
    for page in pages():
        for block in blocks(page):
            assert re.fullmatch(r"|run|file [\w.]+|.*[Tt]able.*", block.mark), f"{page.name}: {block.mark}"


def test_files_that_the_documents_name_exist() -> None:
    for page in pages():
        for name in re.findall(
            r"`((?:tests|scripts|bench|configs|notebooks|examples|src)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
    for page in pages():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", ["README.md", "docs/DATA.md"])
def test_the_records_shown_are_read_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [block.text for block in blocks(ROOT / name) if block.language == "json"]
    rows = "".join(shown)
    assert rows.count("\n") == len(list(map(json.loads, rows.splitlines()))) >= 2
    for picture in set(re.findall(r'"(\w+\.png)"', rows)):
        Image.new("RGB", (1280, 720), "white").save(picture)
    Path("rows.jsonl").write_text(rows)
    assert main(["data", "check", "rows.jsonl", "--split", "all", "--max_left_out", "0"]) == 0
    assert not [path.name for path in tmp_path.rglob("left_out.jsonl") if path.read_text()]


def test_the_figure_shows_the_mask_that_the_page_describes() -> None:
    separate, shared = draw_image_sharing.sees(True), draw_image_sharing.sees(False)
    image, (first, second) = draw_image_sharing.PREFIX, draw_image_sharing.QUESTIONS
    assert separate.shape == (2 * image + first + second,) * 2 and shared.shape == (image + first + second,) * 2
    # Rows of the second question: the image and itself, in both layouts, and nothing of the first question.
    rows = shared[image + first :]
    assert (rows[:, :image] == separate[-second:, image + first : 2 * image + first]).all() and rows[:, :image].all()
    assert (rows[:, image + first :] == separate[-second:, -second:]).all()
    assert not rows[:, image : image + first].any() and not shared[:image, image:].any()


def test_the_figure_is_the_one_that_the_script_draws(tmp_path: Path) -> None:
    import matplotlib

    committed = draw_image_sharing.FILE.read_text(encoding="utf-8")
    drawn_with = re.search(r"Matplotlib v([\d.]+)", committed)
    assert drawn_with is not None
    if drawn_with[1] != matplotlib.__version__:
        pytest.skip(f"drawn with Matplotlib {drawn_with[1]}, installed is {matplotlib.__version__}")
    assert draw_image_sharing.render(tmp_path / "again.svg").read_text(encoding="utf-8") == committed


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_the_notebooks_are_clean_and_install_first(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert '"pip", "install"' in "".join(code[0]["source"])
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in code)

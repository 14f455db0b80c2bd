"""What the command line says to a slip of the hand: the nearest word, or why a flag would have no effect."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.report_runs import make_run
from vlm_sft.cli.flag_groups import GROUPS
from vlm_sft.cli.main import main
from vlm_sft.cli.parser import Parser, build_parser
from vlm_sft.common.errors import RecipeError
from vlm_sft.recipe.builtin import RECIPES
from vlm_sft.recipe.load import load_recipe, read_recipe
from vlm_sft.recipe.schema import KEYS

Captured = pytest.CaptureFixture[str]


def sub_parser(verb: str) -> Parser:
    """The parser of one verb."""
    (verbs,) = (one for one in build_parser(verb)._actions if isinstance(one, argparse._SubParsersAction))
    return verbs.choices[verb]


def refused(line: str, capsys: Captured) -> str:
    """What is said on the way out with code 2; a mistake of flags ends the parser itself."""
    try:
        code = main(line.split())
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert code == 2 and told.out == "" and "usage" not in told.err and len(told.err) < 1000
    assert told.err.startswith("error: ") and "\n  fix: " in told.err
    return told.err


@pytest.mark.parametrize(
    "line, told",
    [
        ("train --learning_rat 1e-3", "unknown flag --learning_rat; did you mean --learning_rate?"),  # not --output_dir
        ("train --learning_rat=1e-3 --output_dir o", "unknown flag --learning_rat; did you mean --learning_rate?"),
        ("train -output_dir o", "did you mean --output_dir?"),
        ("train \N{EN DASH}output_dir o", "did you mean --output_dir?"),
        ("train --output_dirr o --epocs 3", "unknown flag --epocs; did you mean --num_train_epochs?"),
        ("train --learning-rte 1e-3 --output_dir o", "did you mean --learning_rate?"),
        ("eval --benchmark demo_charts --output_dir o", "pass --base_model MODEL, --adapter DIR, or both"),
        ("data import x.txt --output o", "--format is missing"),
        ("plan --gpu_typ L4", "did you mean --gpu_type?"),
        ("eval --bechmark chartqa", "unknown flag --bechmark; did you mean --benchmark?"),
        ("data import x --format csv --output o --colums a=b", "did you mean --columns?"),
        (
            "data check x --images a",
            "its flags are --columns, --split, --output_dir, --base_model, --max_length, --limit",
        ),
        ("data check x --zzz", "unknown flag --zzz\n"),
        ("--verbose train", "unknown flag --verbose\n  fix: flags come after"),
        ("trian --output_dir o", "vlm-sft does not know 'trian'; did you mean train?"),
        ("data chek x", "vlm-sft data does not know 'chek'; did you mean check?"),
        ("data cache cleer", "did you mean clear?"),
        ("ask a.png", "missing: QUESTION\n  fix: write vlm-sft ask IMAGE QUESTION; vlm-sft ask --help"),
        ("eval", "missing: --benchmark, --output_dir"),
        ("train --output_dir", "--output_dir: a value is missing"),
        ("train --output_dir o --on_bad_sample replac", "'replac' is not one of stop, replace; did you mean replace?"),
        ("data check x --split trian", "did you mean train?"),
        ("score --benchmark chart_qa --predictions x", "did you mean chartqa?"),
        ("train --output_dir o --max_bad_steps ten", "--max_bad_steps: 'ten' is not a whole number"),
        ("train --output_dir o more", "nothing takes 'more'"),
        ("train --output_dir o --lr_scheduler_type cosin", '"warmup_stable_decay"; did you mean cosine?'),
        ("train --output_dir o --report_to wandbb", "did you mean wandb?"),
        ("train --output_dir o --sft_config bst", "did you mean best?"),
        ("train --output_dir o --dataset chartq", "did you mean chartqa?"),
        ("train --output_dir o --max_bad_steps " + "9" * 50_000 + "x", "(50,001 characters) is not a whole number"),
        ("train --output_dir o --" + "x" * 50_000, "unknown flag --xxx"),
        ("completion bsh", "did you mean bash?"),
    ],
    ids=lambda text: text[:40],
)
def test_the_nearest_word_is_named(
    line: str, told: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").write_text("{}")  # a stray file is no answer to the name of a recipe
    assert told in refused(line, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_without_a_verb_the_help_names_them_all(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    told = capsys.readouterr().out
    assert not end.value.code and all(verb in told for verb in ("train", "eval", "report", "ask", "export"))


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("train --output-dir o", "output_dir", Path("o")),
        ("train --output_dir o --learning-rate=1e-3", "learning_rate", "1e-3"),
        ("train --output_dir o --lr 1e-3", "learning_rate", "1e-3"),
        ("train --output_dir o --lora-rank 3", "lora_r", "3"),
        ("train --output_dir o --model_name_or_path pocket", "base_model", "pocket"),
        ("eval --output_dir o --benchmark demo --model pocket", "base_model", "pocket"),
        ("train --output_dir o --system=--lr", "system", "--lr"),
    ],
)
def test_flags_go_with_hyphens_and_by_the_names_of_other_trainers(line: str, name: str, value: object) -> None:
    words = line.split()
    args = build_parser(words[0]).parse_args(words)
    assert getattr(args, name) == value and name in args.given


def test_an_image_behind_its_question_is_recognized(tmp_path: Path, capsys: Captured) -> None:
    Image.new("RGB", (64, 48), "white").save(tmp_path / "a.png")
    assert main(["ask", "What is shown?", str(tmp_path / "a.png"), "--max_new_tokens", "2"]) == 0
    told = capsys.readouterr()
    assert "a.png is taken for the image" in told.err and "What is shown?" in told.out


def test_a_folder_of_runs_is_its_runs(tmp_path: Path, capsys: Captured) -> None:
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "second")
    (tmp_path / "runs" / "notes").mkdir()
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "r.html")]) == 0
    assert "2 runs in" in capsys.readouterr().out
    assert "first" in (tmp_path / "r.html").read_text() and "second" in (tmp_path / "r.html").read_text()


def test_values_that_look_like_flags_are_values() -> None:
    words = ["train", "--output_dir", "o", "--system", "-be brief", "--learning_rate", "-1", "--prompt_template=--x"]
    args = build_parser("train").parse_args(words)
    assert (args.system, args.learning_rate, args.prompt_template) == ("-be brief", "-1", "--x")
    assert args.given == {"output_dir", "system", "learning_rate", "prompt_template"}
    args = build_parser("ask").parse_args(["ask", "a.png", "--", "--flag?", "-5 or 5?"])
    assert args.questions == ["--flag?", "-5 or 5?"]


IDLE = [
    ("train --output_dir o --allow_changes", "--allow_changes has no effect without --resume"),
    (
        "train --output_dir o --resume --overwrite_output_dir",
        "--overwrite_output_dir has no effect together with --resume",
    ),
    ("eval --base_model pocket --benchmark demo_charts --output_dir o --allow_prompt_mismatch", "without --adapter"),
    (
        "eval --base_model pocket --benchmark demo_charts --output_dir o --backend vllm --tokens_per_pack 9 "
        "--prepared_cache off",
        "--tokens_per_pack, --prepared_cache have no effect on --backend vllm",
    ),
    (
        "eval --base_model pocket --benchmark demo_charts --output_dir o --tensor_parallel_size 2",
        "--tensor_parallel_size has no effect without --backend vllm",
    ),
    ("eval --base_model pocket --benchmark demo_charts:2 --output_dir o", "the weight 2 of demo_charts has no effect"),
    ("export --adapter a --output_dir o --dtype bfloat16", "--dtype has no effect without --merge"),
    ("export --adapter a --output_dir o --dtype auto", "--dtype has no effect without --merge"),  # also its default
    ("export --adapter a --output_dir o --public", "--public has no effect without --push_to_hub"),
    ("export --adapter a --output_dir o --merge --peft_only", "--peft_only has no effect on a merged model"),
    ("verify r --checkpoints_only --steps 8", "--steps has no effect with --checkpoints_only"),
    ("plan --image_size 100x100", "--image_size has no effect without --questions"),
    ("plan --questions 10 --dataset chartqa", "--dataset has no effect with --questions"),
    ("recommend --hours 1 --questions 9 --sft_config best", "--sft_config has no effect here"),
    ("recommend --hours 1 --answer_tokens 9", "--answer_tokens has no effect without --questions"),
    ("data export demo --format csv --output o --style alpaca", "--style has no effect on --format csv"),
    ("data export demo_charts:3 --format csv --output o", "the weight 3 of demo_charts has no effect here"),
    ("report r --port 80", "--port is only for --watch"),
    ("data cache clear --all --older_than 3", "say what to remove"),
]


@pytest.mark.parametrize("line, told", IDLE, ids=[line for line, _ in IDLE])
def test_a_flag_without_effect_is_refused(
    line: str, told: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        assert main(line.split()) == 2
    except SystemExit as end:
        assert end.code == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_recipe_keys_without_effect_are_noted() -> None:
    loaded = read_recipe(
        None,
        {
            "eval_strategy": "epoch",
            "eval_steps": "5",
            "save_strategy": "no",
            "save_steps": "5",
            "save_total_limit": "2",
            "train": "projector",
            "lora_r": "8",
        },
    )
    idle = [note for note in loaded.notes if "has no effect" in note]
    assert [note.partition(" ")[0] for note in idle] == ["eval_steps", "save_steps", "save_total_limit", "lora_r"]
    assert not read_recipe("best", {"eval_strategy": "epoch"}).notes[1:]  # what a file holds is no slip of the hand


@pytest.mark.parametrize("name", RECIPES.values())
def test_recipes_of_the_package_load_by_name_in_python(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # an output folder of that name is not the recipe
    stem = next(stem for stem, short in RECIPES.items() if short == name)
    text = (Path(load_recipe.__code__.co_filename).parent / "files" / f"{stem}.json").read_text()
    assert load_recipe(name) == load_recipe(Path(name)) == load_recipe(None, json.loads(text))


@pytest.mark.parametrize(
    "path, told",
    [
        ("smoketst", "did you mean smoketest?"),
        ("BEST", "did you mean best?"),
        ("sft_config_best.json", "did you mean best?"),
        ("configs/sft_config_1epoch.json", "did you mean 1epoch?"),
        ("min.json", "did you mean mine.json?"),
        ("zzz", "check its path, or name a recipe of the package: smoketest, "),
    ],
)
def test_a_recipe_that_is_not_there(path: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert told in str(caught.value)


@pytest.mark.parametrize("verb", ["train", "plan", "recommend", "sweep", "eval"])
def test_each_flag_stands_in_one_group_of_the_help(verb: str) -> None:
    parser = sub_parser(verb)
    page = parser.format_help()
    shown = re.findall(r"^  (?:-h, )?--(\w+)", page, re.MULTILINE)
    flags = {action.option_strings[-1][2:] for action in parser._actions if action.help != argparse.SUPPRESS}
    assert sorted(shown) == sorted(flags), "each flag once"
    titles = re.findall(r"^([a-z].*):$", page, re.MULTILINE)
    assert titles[:2] == ["run", "data"] and "engine" in titles and "options" not in titles
    assert "others" not in titles, f"cli/flag_groups.py does not name {page.partition('others:')[2]}"


def test_the_groups_of_flags_name_each_flag_once_and_no_other() -> None:
    named = [name for group in GROUPS for name in group.names]
    parsers = [sub_parser(verb) for verb in ("train", "plan", "recommend", "sweep", "eval")]
    known = {option[2:] for parser in parsers for option in parser._option_string_actions if option.startswith("--")}
    assert len(named) == len(set(named)) and set(named) <= known
    assert set(KEYS) <= set(named), "every recipe key has a group"

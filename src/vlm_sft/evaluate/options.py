"""Options of everything that answers questions: how they are put to the model, and how long an answer may be."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_sft.common.options import option


def unescaped(text: str) -> str:
    """A text as a shell passes it: a backslash and an n stand for a new line."""
    return text.replace("\\n", "\n")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Options of training and evaluation; a prompt or system text of None keeps what base or adapter come with."""

    prompt_template: str | None = option(
        None, "the user's text with {question} in it, \\n for a new line: ", "TEXT", parse=unescaped
    )
    system: str | None = option(None, "system text: ", "TEXT", parse=unescaped)
    max_new_tokens: str | None = option(
        None,
        "limit of an answer in tokens, for all or by benchmark: 32, or chartqa=32,textvqa=16 (default: the "
        "benchmark's; for your own data what its longest answer needs)",
        "N",
    )
    metric: str | None = option(
        None,
        "how answers to your own data are scored: exact_match (default), relaxed_accuracy, vqa_accuracy, anls, "
        "multiple_choice, squad_f1, contains, relaxed_anls, cider, bleu4, rouge_l, judge, or your own "
        "function "
        "module:function; several data sets: NAME=RULE,...",
        "RULE",
    )
    judge: str | None = option(
        None,
        "who grades answers to charxiv, chartmuseum and own data with --metric judge: a command that answers each line "
        "of JSON with one, or the address of an OpenAI-compatible server (http://host:8000/v1)",
        "COMMAND|URL",
    )
    judge_model: str | None = option(None, "the model that is asked at the address of --judge", "NAME")
    shard_weights: str = option(
        "auto",
        "shard the weights over the ranks during the evaluation (FSDP2): auto does so if the model does not fit "
        "on one device (default: %(default)s)",
        choices=("auto", "true", "false"),
    )


PROMPT = ("prompt_template", "system")  # options whose help needs to say what they replace

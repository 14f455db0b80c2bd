"""Samples as conversations in the chat format: their texts and images in order, the question in its prompt template."""

from __future__ import annotations

from vlm_sft.data.chat import Message, message
from vlm_sft.data.prompt import SHORT_ANSWER_TEMPLATE, PromptSettings
from vlm_sft.data.sample import PlacedTurn, Sample
from vlm_sft.data.sources.spec import is_own

# Two user texts that share no first token: what their sequences share is the part before the question.
PROBES = ("A", "9")
# Their questions say what form the answer has (a letter, a formula, …), or the benchmark's own scripts add nothing.
COMPLETE = frozenset(("ai2d", "charxiv", "mmmu", "ocrbench", "realworldqa"))


def template_of(prompt: PromptSettings, dataset: str) -> str:
    """The template that questions of a data set are put in: "{question}" where they say themselves what is wanted.

    Args:
        prompt: a template other than the toolkit's own holds for all benchmarks.
        dataset: as of `Sample`.
    """
    complete = dataset in COMPLETE and prompt.template == SHORT_ANSWER_TEMPLATE
    return "{question}" if complete else prompt.template_for(is_own(dataset))


def conversation(sample: Sample, prompt: PromptSettings, question: str | None = None) -> list[Message]:
    """The conversation of a sample up to the place where its answer begins.

    Args:
        sample: the sample.
        prompt: its template and system text.
        question: instead of the sample's own question, with the same images in it.
    """
    return _with_system(sample, prompt, _filled(sample, prompt, question))


def probe_conversation(sample: Sample, prompt: PromptSettings) -> list[Message]:
    """A conversation with the sample's pictures, what stands before the last of them, and nothing else of its own."""
    if not sample.places:
        *_, (role, text, places) = _filled(sample, prompt, PROBES[0])
        return _with_system(sample, prompt, [(role, text, places or (0,) * len(sample.images))])
    *before, (role, text, places) = _filled(sample, prompt, None)[: sample.places[-1].turn + 1]
    return _with_system(sample, prompt, [*before, (role, text[: places[-1]] + PROBES[0], places)])


def _with_system(sample: Sample, prompt: PromptSettings, turns: list[PlacedTurn]) -> list[Message]:
    system = sample.system or prompt.system
    return [*([message("system", system)] if system else []), *(message(*turn) for turn in turns)]


def _filled(sample: Sample, prompt: PromptSettings, question: str | None) -> list[PlacedTurn]:
    """As `Sample.turns`, with the question in the prompt template; images before a question stay before both."""
    *history, (role, text, places) = sample.turns(question)
    template = template_of(prompt, sample.dataset)
    before = template.index("{question}")
    return [*history, (role, template.replace("{question}", text), tuple(at and before + at for at in places))]

"""An export against the adapter that it was made from: the same logits and answers.

One side is the adapter as this package evaluates it; the other is opened by plain transformers (and PEFT) from the new
folder, with the folder's own processor. Both answer a few questions greedily.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from vlm_sft.common import artifacts
from vlm_sft.common.console import progress
from vlm_sft.common.errors import DataError, ModelError
from vlm_sft.data.collate import collate
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import check_image, decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.registry import load_split
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.model import packed_forward
from vlm_sft.model.families import STATEFUL, TOKENWISE, layer_kinds
from vlm_sft.model.sharing_check import TOLERANCE
from vlm_sft.model.vision_features import as_weights

ANSWER_TOKENS = 32
EXAMPLES = 4  # that the report shows


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """A greedy answer.

    Attributes:
        prompt: (P,) int64, the tokens that were asked.
        tokens: (T,) int64, the answer with its end token.
        logits: (T, V) float32, what each token was chosen from.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor


def find_questions(run: Path, count: int, encoder: Encoder) -> tuple[list[Sample], str]:
    """Questions to compare on: those of the run's evaluation with their saved pictures, else on generated charts.

    Pictures that cannot be decoded are passed over.

    Args:
        run: the run's folder.
        count: at most so many.
        encoder: of the base. Other programs tokenise a text that holds the name of a control token otherwise, so such
            questions cannot be compared; nor can pictures that its processor does not take.

    Returns:
        The questions, and where they come from in a few words.
    """
    evaluation = run / artifacts.EVALUATION_FOLDER
    found: list[tuple[Path, Path, dict[str, Any]]] = []
    for path in sorted(evaluation.glob(f"tuned/*/{artifacts.PREDICTIONS}")):
        for row in artifacts.read_jsonl(path):
            name = row.get("image")
            picture = (evaluation / name).resolve() if isinstance(name, str) else None
            if picture and picture.is_relative_to(evaluation.resolve()) and picture.is_file():
                found.append((path, picture, row))
    step = max(1, len(found) // count)
    spread = (_comparable(*one, encoder) for start in range(step) for one in found[start::step])
    if chosen := list(islice(filter(None, spread), count)):
        return chosen, "pictures that the run saved"
    (spec,) = parse_datasets("demo_charts")
    return load_split(spec, "test", count).samples[:count], "generated charts"


def _comparable(path: Path, picture: Path, row: dict[str, Any], encoder: Encoder) -> Sample | None:
    """The question of a prediction about its saved picture; None where it cannot be compared."""
    try:
        image = check_image(ImageRef.from_path(picture))
    except (DataError, OSError):
        return None
    sample = Sample(str(row["id"]), path.parent.name, "", (image,), str(row["question"]), "", ())
    return sample if encoder.problem(sample) is None and encoder.has_ordinary_prompt(sample) else None


def greedy(stop_ids: Sequence[int], pad_id: int | None) -> GenerationConfig:
    """Plain greedy decoding; a base's own settings may sample or punish repetition, which our evaluation does not."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0] if pad_id is None else pad_id,
    )


def our_answers(model: Any, encoder: Encoder, samples: Sequence[Sample], label: str) -> list[GreedyAnswer]:
    """Answers of a model that this package loaded, asked as its evaluation asks."""
    config = greedy(encoder.stop_ids, encoder.tokenizer.pad_token_id)
    answers = []
    with progress(len(samples), label, "questions") as bar:
        for sample in samples:
            batch = collate([Bundle(0, (0,))], [encoder.encode([sample], with_answers=False)])
            batch = batch.to(packed_forward.unwrap(model).device)
            answers.append(_generate(model, packed_forward.separate_inputs(model, batch), config))
            bar.advance()
    return answers


def folder_answers(
    model: Any, processor: Any, encoder: Encoder, samples: Sequence[Sample], label: str
) -> list[GreedyAnswer]:
    """Answers of a plainly opened model to the plain inputs of the folder's own processor."""
    config = greedy(encoder.stop_ids, encoder.tokenizer.pad_token_id)
    types = "mm_token_type_ids"  # most processors give them to models that take them, some on demand
    wanted = {f"return_{types}": True} if types in inspect.signature(model.forward).parameters else {}
    answers = []
    with progress(len(samples), label, "questions") as bar:
        for sample in samples:
            pictures = [decode_rgb(image.load(), image.source) for image in sample.images]
            shown = {"images": [pictures]} if pictures else {}
            inputs = processor(text=[encoder.prompt_text(sample)], **shown, return_tensors="pt", **wanted)
            answers.append(_generate(model, as_weights(model, inputs.to(model.device)), config))
            bar.advance()
    return answers


@torch.no_grad()
def _generate(model: Any, inputs: dict[str, Any], config: GenerationConfig) -> GreedyAnswer:
    # transformers' cache asks an attention layer how long the sequence is; a model without one goes on from its tokens.
    cached = not {*STATEFUL, *TOKENWISE}.issuperset(layer_kinds(packed_forward.unwrap(model).config))
    output = model.generate(
        **inputs, generation_config=config, return_dict_in_generate=True, output_logits=True, use_cache=cached
    )
    prompt = inputs["input_ids"][0].cpu()
    logits = torch.cat([step.float().cpu() for step in output.logits])
    return GreedyAnswer(prompt, output.sequences[0, len(prompt) :].cpu(), logits)


def compare(
    ours: Sequence[GreedyAnswer], theirs: Sequence[GreedyAnswer], dtype: torch.dtype, moved: float
) -> dict[str, Any]:
    """Compare answers and logits.

    Where the two best logits are nearer than the two sides are to each other, rounding may choose another token:
    such a question counts as a near tie. Any other difference is a failure.

    Args:
        ours, theirs: answers to the same questions.
        dtype: number format of the export's weights; it says how much rounding explains.
        moved: from `effect`. Half of what the adapter changes is never taken for rounding: a small update that the
            number format swallows is a failure.

    Returns:
        "questions", "identical_answers", "near_ties", "different_prompts", "largest_difference" (root mean square of
        the logits' difference, relative to their spread; the worst question), "tolerance", "effect", "passed".
    """
    identical = near = prompts = 0
    errors = [0.0]
    for left, right in zip(ours, theirs, strict=True):
        if not torch.equal(left.prompt, right.prompt):
            prompts += 1
            continue
        steps = min(len(left.tokens), len(right.tokens))
        differing = (left.tokens[:steps] != right.tokens[:steps]).nonzero()
        steps = int(differing[0]) + 1 if len(differing) else steps
        delta = (left.logits[:steps] - right.logits[:steps]).double()
        errors.append(float(delta.square().mean().sqrt() / left.logits[:steps].double().std()))
        if len(differing):
            best = left.logits[steps - 1].topk(2).values
            near += bool(best[0] - best[1] <= 2 * delta[-1].abs().max())
        else:
            identical += torch.equal(left.tokens, right.tokens)
    worst, limit = max(errors), max(TOLERANCE[torch.float32], min(TOLERANCE[dtype], moved / 2))
    passed = prompts == 0 and identical + near == len(ours) and worst <= limit
    return {
        "questions": len(ours),
        "identical_answers": identical,
        "near_ties": near,
        "different_prompts": prompts,
        "largest_difference": worst,
        "tolerance": limit,
        "effect": moved,
        "passed": passed,
    }


def effect(base: Sequence[GreedyAnswer], tuned: Sequence[GreedyAnswer]) -> float:
    """How far the adapter moves the logits of the first answer token: root mean square, relative to their spread."""
    deltas = torch.stack([(right.logits[0] - left.logits[0]).double() for left, right in zip(base, tuned, strict=True)])
    spread = torch.stack([left.logits[0].double() for left in base]).std()
    return float(deltas.square().mean().sqrt() / spread)


def require(result: dict[str, Any], what: str) -> None:
    """Refuse an export that is not what it was made from.

    Raises:
        ModelError: with the numbers of `compare`.
    """
    if not result["passed"]:
        raise ModelError(
            f"{what} does not answer as the adapter does: {result['identical_answers']} of {result['questions']} "
            f"answers are the same ({result['near_ties']} near ties, {result['different_prompts']} with other prompt "
            f"tokens), logits differ by {result['largest_difference']:.2g} of their spread "
            f"({result['tolerance']:.2g} allowed; the adapter changes them by {result['effect']:.2g})",
            "nothing was written; an update that is lost in rounding survives --dtype float32",
        )


def examples(
    samples: Sequence[Sample], ours: Sequence[GreedyAnswer], theirs: Sequence[GreedyAnswer], tokenizer: Any
) -> list[dict[str, str]]:
    """A few questions with both answers, for the report."""
    rows = []
    for sample, left, right in list(zip(samples, ours, theirs, strict=True))[:EXAMPLES]:
        texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in (left, right)]
        rows.append({"question": sample.question, "adapter": texts[0], "export": texts[1]})
    return rows

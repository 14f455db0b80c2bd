"""Samples that are too long for a run: found, treated as the recipe says, told and written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from vlm_sft.common import artifacts
from vlm_sft.common.console import is_main_process, warn
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.oversized import KEEP, Fitted, LengthRule, Oversized, Policy, fit, lines, oversized, to_json
from vlm_sft.data.sample import Sample
from vlm_sft.model.load import Base
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.recipe.schema import Recipe


def length_rule(recipe: Recipe, base: Base) -> LengthRule:
    """How long the samples of a run may be."""
    return LengthRule(recipe.max_length, base.context, cast(Policy, recipe.oversized))


def prepared(
    run: TrainingRun, samples: Sequence[Sample], encoder: Encoder, rule: LengthRule, part: str, cache: DataCache
) -> PreparedData:
    """Encode samples, those that are too long as the rule says; says and records which they are.

    Args:
        run: its folder gets oversized.jsonl, where there is such a sample.
        samples: of one part of the data.
        encoder, cache: as of `PreparedData`.
        rule: from `length_rule`.
        part: "training" or "evaluation loss".
    """
    # Where all are kept, their lengths are known once they are encoded.
    fitted = fit(samples, encoder, rule, part) if rule.policy != KEEP else Fitted(list(samples))
    data = PreparedData(fitted.samples, encoder, f"preparing ({part})", cache)
    data.left_out = [*fitted.left_out, *data.left_out]
    tell(run, [*fitted.found, *oversized(data.sample_lengths(), rule, part)], rule, len(samples), part)
    return data


def tell(run: TrainingRun, found: Sequence[Oversized], rule: LengthRule, total: int, part: str) -> None:
    """Warn of samples that are too long, note it in run.json and name each in oversized.jsonl.

    Args:
        run: its folder.
        found: the samples.
        rule: that they do not keep to.
        total: how many samples were looked at.
        part: of the data, in words.
    """
    path = run.options.output_dir / artifacts.OVERSIZED
    for line in lines(found, rule, total, part, str(path)):
        warn(line)
        run.record.note(line)
    if found and is_main_process():
        before = list(artifacts.read_jsonl(path)) if path.is_file() else []
        artifacts.write_jsonl(path, [*before, *map(to_json, found)])

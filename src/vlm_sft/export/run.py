"""One export from the command line to a verified folder, readable top to bottom.

The folder is written aside and gets its name when it was opened again and compared; a failure leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_sft.common import artifacts
from vlm_sft.common.console import say, warn
from vlm_sft.common.errors import ModelError, RunError
from vlm_sft.common.record import now, versions
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.data.encode import Encoder
from vlm_sft.data.oversized import LengthRule, fit
from vlm_sft.data.sample import Sample
from vlm_sft.distributed.launch import quiet_libraries
from vlm_sft.export.hub import push
from vlm_sft.export.merge import export_dtype, write_adapter
from vlm_sft.export.request import AUTO, ExportOptions
from vlm_sft.export.source import Source, find_source
from vlm_sft.export.verify import (
    GreedyAnswer,
    compare,
    effect,
    examples,
    find_questions,
    folder_answers,
    our_answers,
    require,
)
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.layout import empty_model
from vlm_sft.model.load import load_model
from vlm_sft.model.merged import write_merged
from vlm_sft.model.model_folder import require_utf8
from vlm_sft.model.saved_adapter import BASE_WEIGHTS, Contents, require_fit
from vlm_sft.model.sharing_check import require_computable
from vlm_sft.model.vllm_rules import TOWER, TOWER_NOTE, lora_settings, not_for_vllm
from vlm_sft.report.card import ADAPTER, MERGED, About, card

PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class _Reference:
    """The answers of the adapter before the export, and how far they are from those of its base."""

    samples: list[Sample]
    origin: str
    encoder: Encoder
    tuned: list[GreedyAnswer]
    effect: float


def export(options: ExportOptions) -> Path:
    """Export an adapter.

    Returns:
        The new folder.

    Raises:
        VlmSftError: the adapter, the base or the folder cannot be used, the adapter would be passed over by loaders,
            or the export does not answer as the adapter does.
    """
    quiet_libraries()
    if options.questions < 1:
        raise RunError(f"--questions {options.questions}: an export is compared on at least one", "pass 1 or more")
    require_utf8(options.output_dir, "--output_dir")
    _require_free(options.output_dir)
    with artifacts.OutputFolder(options.output_dir).or_nothing():
        folder = _carry_out(options)
    if options.repository:
        address = push(folder, options.repository, private=not options.public)
        say(f"uploaded to {address}")
    return folder


def _carry_out(options: ExportOptions) -> Path:
    """Write, verify and publish the folder; returns it."""
    folder = options.output_dir
    source = find_source(options.adapter, options.base_model)
    say(f"exporting {options.adapter} on {source.base.name}{', merged' if options.merge else ''}")
    contents = require_fit(source.adapter, source.base, options.allow_other_base)
    empty = empty_model(source.base.path)
    problems = not_for_vllm(source.config, contents.layers, empty)
    _judge(contents, problems, options)
    loads = options.merge or not problems
    settings = {} if options.merge or problems else lora_settings(source.config, contents.layers, empty)
    if TOWER in settings:
        warn(f"--adapter {options.adapter}: {TOWER_NOTE}")
    vllm = {"loads": loads, "reasons": [] if loads else list(problems), **settings}
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype, check = _write_verified(options, source, partial)
        report = _report(options, source, contents, vllm, dtype, check)
        artifacts.write_text_atomic(partial / artifacts.CARD, card(_about(source, report)))
        report["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        artifacts.write_json(partial / artifacts.EXPORT, report)
        for path in partial.iterdir():
            path.chmod(artifacts.FILE_MODE)  # safetensors makes its file readable for its owner only
        os.replace(partial, folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}", "choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report_result(folder, report)
    return folder


def _write_verified(options: ExportOptions, source: Source, partial: Path) -> tuple[torch.dtype, dict[str, Any]]:
    """Write the weights into an empty folder, and compare them with the adapter.

    Returns:
        Their number format, and what `_verify` found.

    Raises:
        ModelError: they answer otherwise.
    """
    model = _placed(load_adapter(load_model(source.base), source.adapter))
    reference = _reference(model, source, options.questions)
    if not options.merge:
        write_adapter(source, partial)
        del model
        check = _verify(partial, source, reference, torch.float32, merged=False)
        require(check, "the exported adapter")
        return torch.float32, check
    dtype = export_dtype(options.dtype, source.base)
    write_merged(model.cpu(), source.base, partial, dtype)
    del model
    check = _verify(partial, source, reference, dtype, merged=True)
    if not check["passed"] and options.dtype == AUTO and dtype != torch.float32:
        say("16 bits would round away the adapter's changes: the merged weights are written in float32")
        shutil.rmtree(partial)
        partial.mkdir()
        dtype = torch.float32
        write_merged(load_adapter(load_model(source.base), source.adapter), source.base, partial, dtype)
        check = _verify(partial, source, reference, dtype, merged=True)
    require(check, "the merged model")
    return dtype, check


def _require_free(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        RunError: it does, or it is a file.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RunError(f"--output_dir {folder} is not empty", "choose a new folder: an export overwrites nothing")


def _judge(contents: Contents, vllm: tuple[str, ...], options: ExportOptions) -> None:
    """Say what of an adapter does nothing; refuse one that vLLM would not load, unless that is wanted.

    Raises:
        ModelError: with vLLM's reasons.
    """
    if contents.dead:
        warn(f"{len(contents.dead)} of {len(contents.layers)} adapted layers have an update of zero")
    if vllm and not options.merge:
        text = "; ".join(vllm)
        if not options.peft_only:
            raise ModelError(
                f"--adapter {options.adapter}: {text}",
                "pass --merge, or --peft_only for an adapter that only PEFT opens",
            )
        warn(f"{text}; only PEFT opens this adapter")


def _placed(model: Any) -> Any:
    """On the GPU where there is one with room for the model, else on the CPU; in evaluation mode."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * size:
        model = model.to("cuda")
    return model.eval()


def _reference(model: Any, source: Source, questions: int) -> _Reference:
    """Ask the adapter, and its base."""
    encoder = encoder_of(source.base)
    require_computable(model, encoder, whole=False)
    samples, origin = find_questions(source.run, questions, encoder)
    rule = LengthRule.recorded(source.base.prompt, source.base.context)
    if rule.text:
        samples = fit(samples, encoder, rule, "questions").samples or samples
        origin += f"; those that are too long: {rule.text}, as in the training"
    say(f"comparing on {len(samples)} questions: {origin}")
    tuned = our_answers(model, encoder, samples, "adapter")
    with model.disable_adapter():
        moved = effect(our_answers(model, encoder, samples, "base"), tuned)
    if not moved:
        warn("the adapter changes nothing on these questions")
    return _Reference(samples, origin, encoder, tuned, moved)


def _verify(partial: Path, source: Source, reference: _Reference, dtype: torch.dtype, merged: bool) -> dict[str, Any]:
    """Open the new folder with plain transformers and PEFT, ask it the same, and compare; returns what it came to."""
    place = str(partial) if merged else source.base.path
    model: Any = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32, trust_remote_code=False)
    if not merged:
        model = PeftModel.from_pretrained(model, str(partial))
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=False) if merged else source.base.processor
    samples = reference.samples
    answers = folder_answers(_placed(model), processor, reference.encoder, samples, "export")
    result = compare(reference.tuned, answers, dtype, reference.effect)
    shown = examples(samples, reference.tuned, answers, reference.encoder.tokenizer)
    return result | {"source": reference.origin, "examples": shown}


def _report(
    options: ExportOptions,
    source: Source,
    contents: Contents,
    vllm: dict[str, Any],
    dtype: torch.dtype,
    check: dict[str, Any],
) -> dict[str, Any]:
    """What export.json says; no folder of this machine is in it."""
    weights = (source.adapter / artifacts.ADAPTER_WEIGHTS).read_bytes()
    return {
        "schema": 1,
        "kind": "merged" if options.merge else "adapter",
        "name": options.output_dir.resolve().name,
        "made": now(),
        "base_model": Path(source.base.name).name if Path(source.base.name).is_dir() else source.base.name,
        BASE_WEIGHTS: weights_fingerprint(source.base.path),
        "adapter_sha256": hashlib.sha256(weights).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "adapted_layers": len(contents.layers),
        "layers_without_effect": len(contents.dead),
        "vllm": vllm,
        "verification": check,
        "versions": versions(),
    }


def _about(source: Source, report: dict[str, Any]) -> About:
    """What the card of an export tells."""
    check = report["verification"]
    verification = (
        f"This folder was opened with plain transformers and compared with the adapter it was made from: "
        f"{check['identical_answers']} of {check['questions']} greedy answers are the same "
        f"({check['near_ties']} differ by a tie within rounding), logits differ by "
        f"{check['largest_difference']:.2g} of their spread, and the adapter changes them by {check['effect']:.2g}; "
        f"asked on {check['source']}. Details: `{artifacts.EXPORT}`."
    )
    return About(
        report["name"],
        MERGED if report["kind"] == "merged" else ADAPTER,
        source.base.name,
        source.base.prompt.to_dict(),
        source.run,
        report["versions"]["vlm-sft"],
        verification=verification,
    )


def _report_result(folder: Path, report: dict[str, Any]) -> None:
    """Say what was written and what to do next."""
    place = shlex.quote(str(folder))
    check = report["verification"]
    say(
        f"verified: {check['identical_answers']} of {check['questions']} answers match the adapter "
        f"({check['near_ties']} near ties); logits differ by {check['largest_difference']:.2g} of their spread "
        f"({check['tolerance']:.2g} allowed; the adapter changes them by {check['effect']:.2g})"
    )
    size = sum(report["files"].values()) / 1e6
    kind = "merged model" if report["kind"] == "merged" else "adapter"
    say(f"{kind}, {size:,.1f} MB: {folder} (card: {artifacts.CARD}, report: {artifacts.EXPORT})")
    if report["kind"] == "merged":
        say(f'next: vlm-sft ask IMAGE "QUESTION" --base_model {place}, or vllm serve {place}')
    else:
        rank = report["vllm"].get("max_lora_rank")
        more = f" --{TOWER.replace('_', '-')}" if TOWER in report["vllm"] else ""
        serve = f"vllm serve BASE --enable-lora{more} --max-lora-rank {rank} --lora-modules tuned={place}, or "
        say(
            f'next: vlm-sft ask IMAGE "QUESTION" --adapter {place}, or {serve if rank else ""}PeftModel.from_pretrained'
        )

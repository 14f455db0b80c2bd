"""What answers questions: the shared-prefix generation of this package, or vLLM."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vlm_sft.common.artifacts import ADAPTER_CONFIG, read_json
from vlm_sft.common.console import warn
from vlm_sft.common.errors import ModelError
from vlm_sft.data.cache.image_tensors import features_of
from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.encode import EncodedGroup, Encoder, ImageSource
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.data.sample import Sample
from vlm_sft.data.threads import ordered_map
from vlm_sft.distributed.collectives import largest_count
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.evaluate.batching import Pack
from vlm_sft.evaluate.generate import Generated, alone, generate, require_countable_cache
from vlm_sft.evaluate.generate_rows import generate_rows, rows_agree
from vlm_sft.model.cpu.matmul import mixed_precision
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.families import PackMode, family_of
from vlm_sft.model.forward_patch import reason_of
from vlm_sft.model.layout import empty_model
from vlm_sft.model.load import Base
from vlm_sft.model.saved_adapter import read_contents
from vlm_sft.model.sharing_check import choose_mode, probe_groups
from vlm_sft.model.vision_features import unwrap
from vlm_sft.model.vllm_rules import TOWER, TOWER_NOTE, lora_settings

# Rounding differs between packs by about 1e-5 in float32. A question whose two best tokens were nearer than this is
# asked again alone, and that answer counts: so the budget of a pack never shows in the answers. In bfloat16 rounding
# is as large as real differences; there, only the same packs give the same answers.
AHEAD = 2  # packs that are encoded while the model answers another one
NEAR_TIES = {torch.float32: 1e-3}


class Reply(NamedTuple):
    """A question with its answer; `cut` where the limit ended it, not an end token."""

    sample: Sample
    text: str
    cut: bool


class Backend(Protocol):
    """Answers packs of questions, in order.

    Attributes:
        in_step: every rank computes the same number of packs (divided weights); what is too many is thrown away.
        separate: every question gets its own copy of its image's tokens.
        blockwise: attention is computed image by image.
    """

    encoder: Encoder
    in_step: bool
    separate: bool
    blockwise: bool

    def answers(self, packs: Sequence[Pack], max_new_tokens: int) -> Iterator[list[Reply]]:
        """Yield for each pack its questions with their answers.

        Args:
            packs: from `plan.share`.
            max_new_tokens: limit of an answer in tokens.
        """
        ...


class SharedPrefixBackend:
    """Generates with a loaded model, all questions of an image from one prefix where the model allows it.

    Args:
        base: where the processor and the prompt come from.
        model: what generates: the base's weights, wrapped by an adapter or not, on its device.
        mode: how its packs are computed; None finds out.
        images: gives the tensors of a question's images; None processes them.

    Attributes:
        in_step: every forward pass needs all ranks (weights are divided), so all take the same number.
        separate, blockwise: as in `Backend`.
    """

    def __init__(
        self, base: Base, model: torch.nn.Module, mode: PackMode | None = None, images: ImageSource | None = None
    ) -> None:
        self.base = base
        self.model: Any = model  # with `disable_adapter` where PEFT wraps it
        self.encoder = encoder_of(base)
        self._images = images or self.encoder.process_images
        self.mode = mode or choose_mode(model, self.encoder)
        self.in_step = is_partitioned(*model.parameters())
        self.separate = not self.mode.shares
        if self.separate:
            require_countable_cache(unwrap(model).config)
        self.blockwise = self.mode.kind == "blockwise"
        # Decoding and encoding happen at the same time, and a tokenizer is not made for two threads.
        self._tokenizer = copy.deepcopy(self.encoder.tokenizer)
        self._companion: EncodedGroup | None = None

    def answers(self, packs: Sequence[Pack], max_new_tokens: int) -> Iterator[list[Reply]]:
        """Encode in one thread, generate in this one; see `Backend`."""
        self.model.eval()
        device = next(self.model.parameters()).device
        self._companion = self._find_companion(packs) if self.in_step else None
        for pack, groups in zip(packs, ordered_map(self._encode, packs, 1, AHEAD), strict=False):
            tokens, cut = self._tokens(groups, device, max_new_tokens)
            texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
            samples = [sample for members in pack for sample in members]
            yield [
                Reply(sample, text.strip(), number in cut)
                for number, (sample, text) in enumerate(zip(samples, texts, strict=True))
            ]

    def _encode(self, pack: Pack) -> list[EncodedGroup]:
        return [self.encoder.encode(members, with_answers=False, tensors=self._images(members[0])) for members in pack]

    def _tokens(
        self, groups: list[EncodedGroup], device: torch.device, max_new_tokens: int
    ) -> tuple[list[list[int]], set[int]]:
        """The answers of one pack, and which of them the limit ended; near ties are decided alone."""
        everything = [Bundle(index, tuple(range(len(group.questions)))) for index, group in enumerate(groups)]
        single = [Bundle(bundle.group, (question,)) for bundle in everything for question in bundle.questions]
        tokens: list[list[int]] = [[] for _ in single]
        cut: set[int] = set()
        again = list(range(len(single)))
        if self.mode.shares or self._in_batches:
            whole = self._generate(everything, groups, device, max_new_tokens)
            tokens, cut = whole.tokens, set(whole.cut)
            again = whole.near_ties if len(single) > 1 else []
        for number in range(self._most(len(again))):
            question = again[number] if number < len(again) else 0
            answer = self._generate([single[question]], groups, device, max_new_tokens)
            if number < len(again):
                tokens[question] = answer.tokens[0]
                cut = cut | {question} if answer.cut else cut - {question}
        return tokens, cut

    def _find_companion(self, packs: Sequence[Pack]) -> EncodedGroup | None:
        """What joins a pack without an image, so that every rank runs the vision tower in every pass.

        All ranks must call it.

        Returns:
            A question about a tiny image; None where no rank runs the tower, or no pack lacks an image.

        Raises:
            ModelError: questions of the model cannot be computed together.
        """
        samples = [sample for pack in packs for members in pack for sample in members]
        seen = next((sample for sample in samples if sample.images), None)
        # Kept features run no tower.
        runs = seen is not None and not features_of(self._images(seen))
        if not self._most(int(runs)) or not self._most(int(any(not sample.images for sample in samples))):
            return None
        if self.separate:
            raise ModelError(
                "some questions have an image and some have none, and the questions of this model are answered one by "
                "one: ranks that share out the weights would wait for each other for ever",
                "evaluate them apart, keep vision features (--feature_cache SIZE), or leave --shard_weights out",
            )
        return probe_groups(self.encoder, with_answers=False)[0]

    def _generate(
        self, bundles: list[Bundle], groups: list[EncodedGroup], device: torch.device, max_new_tokens: int
    ) -> Generated:
        """The answers to the questions of a pack."""
        if self._companion is None or any(groups[bundle.group].tensors for bundle in bundles):
            return self._answered(collate(bundles, groups), device, max_new_tokens)
        pack = [*bundles, Bundle(len(groups), (0,))]
        found = self._answered(collate(pack, [*groups, self._companion]), device, max_new_tokens)
        added = len(found.tokens) - 1
        kept = [[one for one in numbers if one != added] for numbers in (found.near_ties, found.cut)]
        return Generated(found.tokens[:added], *kept)

    def _answered(self, pack: PackedBatch, device: torch.device, max_new_tokens: int) -> Generated:
        batch = pack.to(device)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": self.encoder.stop_ids,
            "near_tie": NEAR_TIES.get(self.base.dtype, 0.0),
        }
        with mixed_precision(device, self.base.dtype):
            if len(batch.sample_ids) > 1 and not self.mode.shares:
                return generate_rows(self.model, batch, **options)
            busy = self._any_rank_busy if self.in_step else alone
            return generate(self.model, batch, mode=self.mode, any_rank_busy=busy, **options)

    @cached_property
    def _in_batches(self) -> bool:
        """Whether questions that share nothing are answered together: where that gives what they get alone."""
        if self.in_step or self.mode.rows != "padded":
            return False
        base = unwrap(self.model)
        with mixed_precision(base.device, self.base.dtype):
            return bool(family_of(base.config).reason) or rows_agree(self.model, self.encoder)

    def _most(self, count: int) -> int:
        """The largest count over the ranks that have to stay in step."""
        return largest_count(count, next(self.model.parameters()).device) if self.in_step else count

    def _any_rank_busy(self, busy: bool) -> bool:
        return self._most(int(busy)) > 0


class VllmBackend:
    """Generates with vLLM: continuous batching on GPUs, the images of equal prompts cached by vLLM itself.

    Args:
        base: where the model, the processor and the prompt come from.
        adapter: folder of a LoRA adapter; None for the base.
        gpus: how many share out the weights (tensor parallelism); `splitting_problem` says whether they can.

    Raises:
        ModelError: vLLM is not installed, or cannot open the model.
    """

    def __init__(self, base: Base, adapter: Path | None, gpus: int = 1) -> None:
        require_vllm()
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.encoder = encoder_of(base)
        self.in_step = False
        self.separate = self.blockwise = False
        bounds = {"min_pixels": base.prompt.min_pixels, "max_pixels": base.prompt.max_pixels}
        self._lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None
        settings = _lora_settings(base, adapter) if adapter else {}
        try:
            self._model = LLM(
                model=base.path,
                dtype=base.dtype_name,
                seed=0,
                trust_remote_code=False,
                tensor_parallel_size=gpus,
                enable_lora=adapter is not None,
                **settings,
                enable_prefix_caching=True,
                mm_processor_kwargs={name: value for name, value in bounds.items() if value is not None},
            )
        except Exception as error:  # memory, drivers, architectures: anything may stand in its way
            raise ModelError(
                f"--backend vllm: vLLM cannot open {base.name} ({reason_of(error)})",
                "more GPUs with --tensor_parallel_size, or leave --backend vllm out",
            ) from error

    def answers(self, packs: Sequence[Pack], max_new_tokens: int) -> Iterator[list[Reply]]:
        """Hand over one pack at a time, so that an interruption loses no more than that; see `Backend`."""
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(self.encoder.stop_ids), seed=0
        )
        for pack in packs:
            samples = [sample for members in pack for sample in members]
            outputs = self._model.generate(
                vllm_requests(self.encoder, samples), greedy, lora_request=self._lora, use_tqdm=False
            )
            yield [
                Reply(sample, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "length")
                for sample, output in zip(samples, outputs, strict=True)
            ]


def _lora_settings(base: Base, adapter: Path) -> dict[str, Any]:
    """The settings with which vLLM loads all of an adapter."""
    config = read_json(adapter / ADAPTER_CONFIG)
    settings = lora_settings(config, read_contents(adapter, config).layers, empty_model(base.path))
    if TOWER in settings:
        warn(f"--adapter {adapter}: {TOWER_NOTE}")
    return settings


def vllm_requests(encoder: Encoder, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The questions as vLLM takes them: the same prompt as in training, and the decoded images.

    A prompt is text, but for one that holds the name of a control token: vLLM's tokenizer would find it.
    """
    requests = []
    for sample in samples:
        pictures = [decode_rgb(image.load(), image.source) for image in sample.images]
        text, ids = encoder.prompt_tokens(sample)
        asked = {"prompt": text} if encoder.has_ordinary_prompt(sample) else {"prompt_token_ids": ids.tolist()}
        requests.append({**asked, **({"multi_modal_data": {"image": pictures}} if pictures else {})})
    return requests


def require_vllm() -> None:
    """Refuse the vLLM backend early where it cannot run.

    Raises:
        ModelError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ModelError(
            "--backend vllm: the package vllm is not installed",
            "pip install 'vlm-sft[vllm]' on a machine with a GPU, or leave out --backend",
        )

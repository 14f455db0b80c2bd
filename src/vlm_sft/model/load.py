"""Find and load a base model with its processor."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
)

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.console import warn
from vlm_sft.common.errors import ModelError, RunError, quoted
from vlm_sft.data.engine_options import Rows
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.model.attention import SHARED_SDPA, SHARED_WINDOWS, assign_attention, assign_windows, attention_name
from vlm_sft.model.cpu.fuse import fuse_modules
from vlm_sft.model.cpu.narrow import narrow_products
from vlm_sft.model.cpu.rotary import fuse_rotary
from vlm_sft.model.families import DEFAULT_BASE, declared_mode, layer_values, other_layers
from vlm_sft.model.forward_patch import holds, is_plain
from vlm_sft.model.gpu.aligned_mlp import align_gated
from vlm_sft.model.gpu.flash import FLASH_WINDOWS, SHARED_FLASH, flash_problem
from vlm_sft.model.hub import model_config, opened
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.layout import empty_model, require_layout, through_sdpa
from vlm_sft.model.model_folder import require_model
from vlm_sft.model.pocket import WEIGHTS
from vlm_sft.model.protocols import VisionLanguageModel
from vlm_sft.model.query_scale import scale_by_index
from vlm_sft.model.recurrent import share_states
from vlm_sft.model.transposed_experts import compare_whole_shapes
from vlm_sft.model.vision_features import inner_model, tower_modules

POCKET = "pocket"
BLOCK_4BIT = 64  # weights that share a scale


@dataclass(frozen=True, slots=True)
class Base:
    """A base model that was found and checked; its weights are loaded by `load_model`.

    Attributes:
        name: as the user gave it: "pocket", a folder or a Hub id.
        path: what transformers opens: a folder or a Hub id.
        processor: its processor.
        prompt: prompt and image settings that evaluation must repeat.
        stop_ids: token ids that end an answer.
        function: name of the attention function of the language model.
        dtype: of the weights and the computation.
        notes: what the user should know: a request that could not be met, and what is done instead.
        load_in_4bit: hold the weights of the language model in 4 bits (QLoRA).
        rows: how its questions run where its configuration says that they cannot share an image; else None.
        context: tokens that the positions of its language model reach; None where its configuration does not say.
    """

    name: str
    path: str
    processor: Any
    prompt: PromptSettings
    stop_ids: tuple[int, ...]
    function: str
    dtype: torch.dtype
    notes: tuple[str, ...]
    load_in_4bit: bool = False
    rows: Rows | None = None
    context: int | None = None

    @property
    def flash(self) -> bool:
        """Whether FlashAttention computes the attention, where the layers of the model take it."""
        return self.function == SHARED_FLASH

    @property
    def dtype_name(self) -> str:
        """Name of the number format, e.g. "float32"."""
        return str(self.dtype).removeprefix("torch.")


def is_blockwise(model: VisionLanguageModel) -> bool:
    """True when the language model attends through our functions and needs no dense mask."""
    return attention_name(model.config.get_text_config()) in (SHARED_SDPA, SHARED_FLASH)


def attention_of(model: VisionLanguageModel) -> str:
    """What computes the attention of a loaded language model, by transformers' names: "sdpa", "eager" and so on."""
    name = attention_name(model.config.get_text_config())
    return {SHARED_SDPA: "sdpa", SHARED_FLASH: "flash_attention_2"}.get(name, name)


def resolve_path(name: str) -> str:
    """Turn the user's name of a base into what transformers opens.

    Raises:
        ModelError: it looks like a folder and is none, or the folder does not hold a whole model.
    """
    if name == POCKET:
        return str(WEIGHTS)
    path = Path(name).expanduser()
    if path.is_dir():
        _require_family(path, name)
        require_model(path, name)
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name
    if looks_local:
        raise ModelError(
            f"--base_model {name}: there is no such folder",
            f"pass an existing folder, a Hub id such as {DEFAULT_BASE}, or {POCKET!r} for the embedded model",
        )
    return name


def _require_family(folder: Path, name: str) -> None:
    """Refuse a text-only model, before its folder is said to lack a processor that it does not need."""
    try:
        family = read_json(folder / "config.json", strict=False).get("model_type")
    except RunError:
        return  # `require_model` reports it
    if isinstance(family, str) and family in CONFIG_MAPPING:
        _require_image_text(CONFIG_MAPPING[family], family, name)


def _require_image_text(config: type, family: str, name: str) -> None:
    """Refuse a family of models that takes no images or writes no text."""
    if config not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"--base_model {name}: {quoted(family)} is not an image-text-to-text model",
            "use a vision-language model, e.g. of the Qwen2.5-VL family",
        )


def default_dtype(bf16: bool | str = "auto") -> torch.dtype:
    """bfloat16 where a GPU has it, float32 elsewhere: whether a CPU's bfloat16 pays, a training measures."""
    if bf16 == "auto":
        bf16 = torch.cuda.is_available() and not emulates_bfloat16()
    return torch.bfloat16 if bf16 else torch.float32


def emulates_bfloat16() -> bool:
    """Whether this process's GPU has no bfloat16 of its own (NVIDIA before Ampere), so that PyTorch emulates it."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _bfloat16_notes(bf16: bool | str) -> list[str]:
    """What to say where a GPU has no bfloat16; a warning where it is computed nevertheless."""
    if not bf16 or not emulates_bfloat16():
        return []
    card = torch.cuda.get_device_name()
    if bf16 == "auto":
        return [f"{card} does not support bfloat16, and emulating it is slower than float32: computing in float32"]
    warn(f"--bf16 true: {card} does not support bfloat16, and emulating it is slower than float32; use auto")
    return []


def choose_attention(flash_attn: bool, dtype: torch.dtype, width: int | None = None) -> tuple[str, list[str]]:
    """Choose the attention function, and say why a requested FlashAttention is not used.

    Args:
        flash_attn: whether FlashAttention was requested.
        dtype: of the model.
        width: of the heads of its language model, where that is known.

    Returns:
        Name of the registered function, notes for the user.
    """
    problem = flash_problem(dtype, width) if flash_attn else None
    if problem:
        return SHARED_SDPA, [f"--flash_attn: {problem}; using SDPA"]
    return SHARED_FLASH if flash_attn else SHARED_SDPA, []


def load_processor(path: str, name: str) -> Any:
    """Load the processor of a model, with its tokenizer's chat template where it has none of its own.

    Raises:
        ModelError: it cannot be opened or takes no images.
    """
    processor = opened(lambda: AutoProcessor.from_pretrained(path, trust_remote_code=False), name)
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"--base_model {name}: its processor takes no images", "use an image-text-to-text model")
    template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if getattr(processor, "chat_template", None) is None and isinstance(template, str):
        processor.chat_template = template
    return processor


def find_base(
    name: str = DEFAULT_BASE,
    *,
    flash_attn: bool = False,
    bf16: bool | str = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    prompt: PromptSettings | None = None,
    template: str | None = None,
    system: str | None = None,
    load_in_4bit: bool = False,
) -> Base:
    """Find a base model and load everything but its weights.

    Args:
        name: "pocket", a folder, or a Hub id.
        flash_attn: use FlashAttention where it can run.
        bf16: True, False or "auto" (on GPUs that have it; a training on a CPU measures, `planning/number_format.py`).
        min_pixels, max_pixels: bounds of the image area in pixels; None keeps the model's own.
        prompt: settings that replace the model's own, e.g. those saved with an adapter.
        template, system: prompt template and system text; None keeps those of the settings.
        load_in_4bit: hold the weights of the language model in 4 bits.

    Raises:
        ModelError: the model cannot be found, reached or opened, is no image-text-to-text model, or is one of a family
            that is not supported.
    """
    if load_in_4bit:
        require_4bit()
    path = resolve_path(name)
    dtype = default_dtype(bf16)
    config = model_config(path, name)
    _require_image_text(type(config), config.model_type, name)
    require_layout(config, name)
    # Layers with wider heads than the narrowest ones are computed by SDPA where FlashAttention does not take them.
    widths = [width for width in layer_values(config.get_text_config(), "head_dim") if width]
    function, notes = choose_attention(flash_attn, dtype, min(widths, default=None))
    settings = prompt or PromptSettings.find(path) or PromptSettings()
    declared = declared_mode(config, "blockwise")
    return Base(
        name=name,
        path=path,
        processor=load_processor(path, name),
        prompt=settings.with_pixels(min_pixels, max_pixels).with_texts(template, system),
        stop_ids=_stop_ids(path),
        function=function,
        dtype=dtype,
        notes=(*_bfloat16_notes(bf16), *notes),
        load_in_4bit=load_in_4bit,
        rows=declared.separate_rows if declared else None,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def require_4bit() -> None:
    """Refuse 4-bit weights where they cannot be used.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "--load_in_4bit true: the package bitsandbytes is not installed", "pip install 'vlm-sft[qlora]'"
        )


def load_model(base: Base, device: str = "cpu") -> Any:
    """Load the weights of a base model, in its dtype; in 4 bits on this process's GPU, where there is one.

    Args:
        base: where they are found.
        device: where they go, tensor by tensor: eight processes of a machine never hold eight models in its memory.

    Raises:
        ModelError: the weights cannot be opened.
    """
    return ready(read_model(base, device), base.function)


def read_model(base: Base, device: str = "cpu") -> Any:
    """As `load_model`, without what this package exchanges in it."""
    compare_whole_shapes(base.path)
    placed = _in_4bit(base) if base.load_in_4bit else {} if device == "cpu" else {"device_map": {"": device}}
    load = partial(
        AutoModelForImageTextToText.from_pretrained,
        base.path,
        dtype=base.dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **placed,
    )
    model, found = opened(lambda: through_sdpa(load, base.path), base.name)
    # transformers would give such weights random values.
    if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ModelError(
            f"--base_model {base.name}: {len(absent)} tensors of the model are not in its weights, or have another "
            f"shape there, e.g. {absent[0]}",
            "copy or download the complete model again",
        )
    if base.load_in_4bit:
        _keep_scales(model)
    else:
        vars(model).pop("hf_device_map", None)  # trainers would think that the model is spread over several devices
    return model


def ready(model: Any, function: str) -> Any:
    """Give loaded weights the attention function and the faster forward passes of this package.

    Args:
        model: as transformers made it; changed in place.
        function: name of the attention function of its language model.
    """
    set_attention(model, function)
    narrow_products(model)
    trim_last_layer(model)
    fuse_modules(model)
    fuse_rotary(model)
    align_gated(model)
    return model


def _keep_scales(model: VisionLanguageModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation, which rounds their scales for good.

    It does so on processors with AVX512-BF16.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _in_4bit(base: Base) -> dict[str, Any]:
    """Loader arguments for QLoRA's number format (Dettmers et al. 2023): NormalFloat4 with quantised constants.

    The vision tower, the projector and the vocabulary projection keep their format: they are small, image features
    stay exact, and a projector may be trained. On a CPU so do layers whose width is not a multiple of a block: there
    bitsandbytes 0.50 gives the rows of such weights wrong scales (its kernel for AVX-512 starts a block with each row).
    """
    empty = empty_model(base.path)
    root = "" if inner_model(empty) is empty else "model."
    kept = ["lm_head", *(f"{root}{name}" for name in tower_modules(empty))]
    if not torch.cuda.is_available():
        linear = ((name, module) for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear))
        kept += [name for name, module in linear if module.in_features % BLOCK_4BIT]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base.dtype,
        llm_int8_skip_modules=kept,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def _stop_ids(path: str) -> tuple[int, ...]:
    """The end tokens of the model's generation settings; none where it has no such file."""
    try:
        value = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        return ()
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def set_attention(model: VisionLanguageModel, attention: str) -> None:
    """Let the language model compute packs, attending through one of our functions; a tower with windows, too."""
    # Sparse attention makes its masks for transformers' functions only, by their names.
    assign_attention(model, "sdpa" if other_layers(model.config) else attention)
    scale_by_index(model.modules())  # no faster form: sharing needs it
    if is_plain():
        return
    share_states(model)
    windows = FLASH_WINDOWS if attention == SHARED_FLASH else SHARED_WINDOWS
    module: Any
    for module in (part for tower in tower_modules(model).values() for part in tower.modules()):
        if holds(_takes_windows, module):
            assign_windows(module.config, windows)


def _takes_windows(module: Any) -> bool:
    """Whether a module of a tower is told where its windows begin."""
    return hasattr(module, "config") and "cu_seqlens" in inspect.signature(module.forward).parameters

"""What is trained on which devices: the model, its adapter, the numbers' format, the kernels and the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_sft.forecast.flops import Adapter
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.shapes import ModelShape

WHOLE = {"gemma3", "paligemma"}  # families whose last layer and head are not trimmed (`model/last_layer.py`)


@dataclass(frozen=True, slots=True)
class RankLayout:
    """How a run is spread over processes.

    Attributes:
        count: processes.
        parallel: "single", "ddp", "fsdp", "zero2", "zero3" or "deepspeed".
    """

    count: int = 1
    parallel: str = "single"

    @property
    def engine(self) -> bool:
        """Whether DeepSpeed's engine runs it."""
        return self.parallel in ("zero2", "zero3", "deepspeed")

    @property
    def shared_optimizer(self) -> int:
        """Ranks that partition gradients and optimizer."""
        return self.count if self.parallel in ("fsdp", "zero2", "zero3") else 1

    @property
    def shared_weights(self) -> int:
        """Ranks that partition the weights."""
        return self.count if self.parallel in ("fsdp", "zero3") else 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What time, memory and disk depend on besides the amount of work.

    Attributes:
        model: the base.
        adapter: what is trained.
        value_bytes: of one frozen weight: 2 in bfloat16, 4 in float32.
        checkpointing: gradient checkpointing.
        rates: of one device.
        four_bit: the language model's weights are held in 4 bits.
        fused: norms and MLPs are computed by liger-kernel (`model/gpu/liger.py`).
        flash_heads: heads of the keys that FlashAttention gathers; 0 where SDPA computes the attention.
        ranks: how the run is spread over processes.
        optim: the optimizer, as in the recipe.
    """

    model: ModelShape
    adapter: Adapter
    value_bytes: int
    checkpointing: bool
    rates: Rates
    four_bit: bool = False
    fused: bool = False
    flash_heads: int = 0
    ranks: RankLayout = RankLayout()
    optim: str = "adamw_torch_fused"

    @property
    def stream_bytes(self) -> int:
        """Bytes of one number between the products: on a CPU in float32 in any case (`model/cpu/narrow.py`)."""
        return self.value_bytes if self.rates.gpu else 4

    @property
    def blockwise(self) -> bool:
        """Whether frozen gated MLPs are computed in blocks (`model/cpu/fuse.py`): on a CPU, if they are whole."""
        return not self.rates.gpu and not self.adapter.everything and self.ranks.shared_weights == 1

    @property
    def blockwise_mlp(self) -> bool:
        """Whether that holds for the language model's MLPs: none of their projections has an adapter."""
        return self.blockwise and not {"gate_proj", "up_proj", "down_proj"} & set(self.adapter.targets)

    @property
    def scored(self) -> bool:
        """Whether the scores of all answer tokens are held at once; `model/cpu/cross_entropy.py` computes blocks."""
        return not (self.blockwise and self.trimmed)

    @property
    def trimmed(self) -> bool:
        """Whether the last layer computes keys and values alone where no answer token is predicted."""
        return self.model.kind not in WHOLE and self.ranks.shared_weights == 1

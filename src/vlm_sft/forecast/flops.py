"""What a run computes: sizes of its packs, and floating-point operations.

The arithmetic counts what is executed: a frozen linear module of N weights costs 2 N per token forward and 2 N backward
(the gradient of its input; its weights have none), attention costs the full square of an image with its questions,
the vision tower runs forward only, the vocabulary projection only where a token is supervised. Gradient checkpointing
adds one forward pass of the layers. tests/unit/test_forecast_flops.py compares with torch's own counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from vlm_sft.data.packing import Bundle, EpochPlanner, GroupLengths, bundle_tokens, row_tokens
from vlm_sft.forecast.shapes import Linear, Linears, ModelShape, StateShape
from vlm_sft.recipe.schema import Recipe

# Products in scaled dot-product attention: two forward; backward four, and a kernel that keeps no scores computes
# those of the forward pass again.
ATTENTION_FORWARD, ATTENTION_BACKWARD = 2, 5
STATE_CHUNK = 48  # tokens that layers with a state compute at once


@dataclass(frozen=True, slots=True)
class Work:
    """Sizes of forward passes; they add up.

    Attributes:
        packs: forward passes.
        tokens: tokens of the language model; padding counts.
        squares: sum over images of the squared tokens of an image with its questions; over questions where each one
            is a sequence of its own.
        supervised: positions where the vocabulary projection runs.
        questions: questions.
        images: images with their prefix.
        visual: visual tokens of the images.
        visual_squares: sum over images of their squared visual tokens.
        keys: keys that FlashAttention gathers: of every prefix, and of every question with its prefix.
    """

    packs: float = 0
    tokens: float = 0
    squares: float = 0
    supervised: float = 0
    questions: float = 0
    images: float = 0
    visual: float = 0
    visual_squares: float = 0
    keys: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def times(self, factor: float) -> Work:
        """The same work, `factor` times."""
        return Work(*(getattr(self, item.name) * factor for item in fields(self)))


NO_WORK = Work()
Pack = tuple[Bundle, ...]


def pack_work(
    pack: Sequence[Bundle], lengths: Sequence[GroupLengths], visual: Sequence[int], separate: bool = False
) -> Work:
    """Sizes of one forward pass.

    Args:
        pack: what it computes; an empty pack is nothing.
        lengths: token counts of every image.
        visual: visual tokens of every image.
        separate: its questions are a padded batch of separate sequences.
    """
    sizes = [bundle_tokens(bundle, lengths[bundle.group]) for bundle in pack]
    keys = sum(sizes) + sum(len(bundle.questions) * lengths[bundle.group].prefix for bundle in pack)
    if separate and pack:
        rows = [tokens for bundle in pack for tokens in row_tokens(bundle, lengths[bundle.group])]
        sizes = [max(rows)] * len(rows)
        keys = sum(sizes)
    seen = [visual[bundle.group] for bundle in pack]
    return Work(
        packs=1 if pack else 0,
        tokens=sum(sizes),
        squares=sum(size * size for size in sizes),
        supervised=sum(lengths[bundle.group].supervised[q] for bundle in pack for q in bundle.questions),
        questions=sum(len(bundle.questions) for bundle in pack),
        images=sum(tokens > 0 for tokens in seen),
        visual=sum(seen),
        visual_squares=sum(count * count for count in seen),
        keys=keys,
    )


@dataclass(frozen=True, slots=True)
class EpochWork:
    """The work of one epoch.

    Attributes:
        slowest: the work that a step waits for: of every round of packs the one with the most tokens.
        total: of all ranks together.
        largest: the largest sizes that any one pack has, each for itself.
        rounds: the most packs that a rank computes in one step.
    """

    slowest: Work
    total: Work
    largest: Work
    rounds: int = 1


def epoch_work(planner: EpochPlanner, visual: Sequence[int], epoch: int = 0) -> EpochWork:
    """Add up the packs of one epoch of a plan.

    Args:
        planner: the plan.
        visual: visual tokens of every image.
        epoch: its number, from 0.
    """
    slowest = total = largest = NO_WORK
    rounds = 1
    for step in planner.epoch(epoch):
        rounds = max(rounds, *map(len, step.ranks))
        for packs in zip(*step.ranks, strict=True):
            works = [pack_work(pack, planner.lengths, visual, planner.rows is not None) for pack in packs]
            slowest += max(works, key=lambda work: work.tokens)
            for work in works:
                total += work
                largest = _largest(largest, work)
    return EpochWork(slowest, total, largest, rounds)


def _largest(left: Work, right: Work) -> Work:
    return Work(*(max(getattr(left, item.name), getattr(right, item.name)) for item in fields(Work)))


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is trained.

    Attributes:
        r: rank of LoRA.
        targets: short names of the linear modules of a layer that have it.
        dropout: whether its input has dropout.
        vision, projector: whether the vision tower, and what joins it to the language model, are trained in full.
        everything: whether all weights are trained, without an adapter.
        vision_r, projector_r: rank of LoRA on all of their linear modules; 0 for none.
    """

    r: int
    targets: tuple[str, ...]
    dropout: bool = True
    vision: bool = False
    projector: bool = False
    everything: bool = False
    vision_r: int = 0
    projector_r: int = 0

    @property
    def trained_tower(self) -> bool:
        """Whether the backward pass goes through the vision tower itself, behind the projector."""
        return self.vision or self.everything or self.vision_r > 0

    @property
    def frozen_tower(self) -> bool:
        """Whether the outputs of tower and projector never change."""
        return not (self.trained_tower or self.projector or self.projector_r > 0)

    def parameters(self, model: ModelShape) -> int:
        """Trained parameters: r (inputs + outputs) per adapted module and layer, and the parts trained in full."""
        if self.everything:
            return model.parameters
        lora = round(model.text.layers * self.layer_parameters(model))
        projector = model.vision.token_weights
        whole = (model.vision.parameters - projector) * self.vision + projector * self.projector
        seeing = sum(rank * (inputs + outputs) for rank, linears in self.seeing(model) for inputs, outputs in linears)
        return lora + whole + seeing

    def seeing(self, model: ModelShape) -> tuple[tuple[int, Linears], ...]:
        """Rank and (inputs, outputs) of the adapted modules of the vision tower, and of the projector."""
        return (self.vision_r, model.vision.linears), (self.projector_r, model.vision.projector_linears)

    def tensors(self, model: ModelShape) -> int:
        """Number of trained tensors, about: two per adapted module, a dozen per layer that is trained in full."""
        whole = 12 * model.vision.layers * (self.vision or self.everything) + 12 * model.text.layers * self.everything
        seeing = sum(len(linears) for rank, linears in self.seeing(model) if rank)
        return round(2 * model.text.layers * self.count(model)) + whole + 2 * seeing

    def modules(self, model: ModelShape) -> list[Linear]:
        """The adapted modules of one layer."""
        return [one for name, one in model.text.linears.items() if name in self.targets]

    def count(self, model: ModelShape) -> float:
        """The number of adapted modules of one layer; the mean where layers differ."""
        return sum(one.share for one in self.modules(model))

    def layer_parameters(self, model: ModelShape) -> float:
        """Numbers of the LoRA matrices of one layer; the mean where layers differ."""
        return self.r * sum(one.share * (one.inputs + one.outputs) for one in self.modules(model))


def adapter_of(recipe: Recipe, model: ModelShape) -> Adapter:
    """What a recipe trains on a model.

    Names of modules that are longer paths count by their last part; where a family has names of its own only, the
    recipes' usual ones are counted, which comes near enough.
    """
    names = [name.rsplit(".", 1)[-1] for name in recipe.target_modules]
    known = tuple(model.text.linears)
    chosen = known if names == ["all-linear"] else tuple(name for name in known if name in names)
    if len(chosen) < 2 <= len(names):
        chosen = tuple(Recipe.target_modules)
    parts = recipe.train
    everything = "all" in parts
    return Adapter(
        recipe.lora_r,
        chosen if "language" in parts and not everything else (),
        recipe.lora_dropout > 0,
        vision="vision" in parts,
        projector="projector" in parts,
        everything=everything,
        vision_r=(recipe.vision_lora_rank or recipe.lora_r) if "vision_lora" in parts else 0,
        projector_r=(recipe.projector_lora_rank or recipe.lora_r) if "projector_lora" in parts else 0,
    )


def forward_flops(model: ModelShape, work: Work, adapter: Adapter | None = None) -> float:
    """Operations of the language model forward, head included."""
    text = model.text
    lora = adapter.layer_parameters(model) if adapter else 0
    layers = text.layers * 2 * (text.layer_weights + lora) * work.tokens
    return layers + ATTENTION_FORWARD * _attention_product(model, work) + 2 * text.embedding * work.supervised


def training_flops(model: ModelShape, work: Work, adapter: Adapter, checkpointing: bool = False) -> float:
    """Operations of the language model forward and backward with LoRA on frozen weights, head included.

    Args:
        model: the model.
        work: what is computed.
        adapter: what is trained.
        checkpointing: the layers are computed a second time in the backward pass.
    """
    text = model.text
    forward = forward_flops(model, work, adapter)
    head = first_head = 2 * text.embedding * work.supervised
    inputs = text.layers * 2 * text.layer_weights * work.tokens
    first = ("q_proj", "k_proj", "v_proj")
    if not checkpointing:
        # Nothing below the first adapted module has a gradient: the inputs of the first layer's attention.
        inputs -= 2 * sum(a * b for name, (a, b, _) in text.linears.items() if name in first) * work.tokens
    lora = text.layers * 4 * adapter.layer_parameters(model) * work.tokens
    if not checkpointing:
        lora -= 2 * sum(adapter.r * text.hidden for name in adapter.targets if name in first) * work.tokens
    if adapter.everything:  # the gradients of the weights themselves
        inputs = 2 * text.layers * 2 * text.layer_weights * work.tokens
        head *= 2
    attention = ATTENTION_BACKWARD * _attention_product(model, work)
    again = forward - first_head if checkpointing else 0.0
    return forward + inputs + lora + attention + head + again


def _attention_product(model: ModelShape, work: Work) -> float:
    """Operations of one product of attention: queries with keys, or scores with values."""
    text = model.text
    return text.layers * text.attending * 2 * text.heads * text.head_dim * work.squares


def exact_flops(model: ModelShape, work: Work, adapter: Adapter, passes: int = 1) -> float:
    """Operations of adapters and attention among those of the language model: on CPUs in float32 in any case.

    Args:
        model, work, adapter: as for `training_flops`.
        passes: how often as many are computed as forward; a backward pass of LoRA is twice one forward.
    """
    lora = 2 * model.text.layers * adapter.layer_parameters(model) * work.tokens
    return passes * (lora + ATTENTION_FORWARD * _attention_product(model, work))


def state_values(states: StateShape, chunk: float = STATE_CHUNK) -> float:
    """Values that the delta rule makes of a token (`model/cpu/delta_rule.py`).

    Of each head queries, keys, values, changes, outputs and gate, four rows of a chunk's matrices, and the token's
    share in the state behind the chunk.
    """
    head = 2 * states.keys + 5 * states.values + 4 * chunk + states.keys * states.values / chunk
    return states.heads * head


def state_flops(states: StateShape) -> float:
    """Operations of the delta rule on a token, forward: the products of `model/cpu/delta_rule.py`."""
    matrices = STATE_CHUNK * (4 * states.keys + 4 * states.values + STATE_CHUNK)
    return states.heads * (matrices + 6 * states.keys * states.values)


def tower_flops(model: ModelShape, visual: float, visual_squares: float) -> float:
    """Operations of the vision tower, forward.

    Args:
        model: the model.
        visual: visual tokens.
        visual_squares: sum over images of their squared visual tokens.
    """
    vision = model.vision
    patches = visual * vision.patches_per_token
    products = 2 * vision.patch_weights * patches + 2 * vision.token_weights * visual
    return products + tower_attention_flops(model, visual, visual_squares)


def tower_backward_flops(model: ModelShape, visual: float, visual_squares: float, adapter: Adapter) -> float:
    """Operations of the backward pass of tower and projector: gradients of inputs, and of weights trained in full.

    Args:
        model, visual, visual_squares: as for `tower_flops`.
        adapter: what is trained.
    """
    vision = model.vision
    patches = visual * vision.patches_per_token
    inputs = 2 * vision.patch_weights * patches * adapter.trained_tower
    weights = 2 * vision.patch_weights * patches * (adapter.vision or adapter.everything)
    joined = 2 * vision.token_weights * visual
    joined *= adapter.trained_tower + (adapter.projector or adapter.everything)
    lora = 0.0
    for (rank, linears), rows in zip(adapter.seeing(model), (patches, visual), strict=True):
        lora += 6 * rank * sum(inputs + outputs for inputs, outputs in linears) * rows  # its forward pass too
    attention = 2 * tower_attention_flops(model, visual, visual_squares) * adapter.trained_tower
    return inputs + weights + joined + lora + attention


def tower_attention_flops(model: ModelShape, visual: float, visual_squares: float) -> float:
    """Operations of the attention among them; arguments as for `tower_flops`."""
    vision = model.vision
    patches, squares = visual * vision.patches_per_token, visual_squares * vision.patches_per_token**2
    windowed = (vision.layers - vision.full_layers) * min(patches * vision.window_patches, squares)
    return 4 * vision.hidden * (vision.full_layers * squares + windowed)

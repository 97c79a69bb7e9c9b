"""What a step of elastic training costs: operations, bytes held and bytes moved, counted from shapes and settings.

The counts are those of the code in `flextron.training`; tests compare them with counters of PyTorch. What a device does
in a second is an assumption (`Gpu`), and said on the page.
"""

from __future__ import annotations

from dataclasses import dataclass

from flextron.model.adapter import linear_shapes
from flextron.model.config import DecoderConfig
from flextron.model.cost import block_parameters, num_parameters, step_flops
from flextron.training.recipe import TrainRecipe

__all__ = [
    "Gpu",
    "Held",
    "Moved",
    "held",
    "layer_activations",
    "lora_parameters",
    "moved",
    "step_operations",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What is assumed of a device and its links."""

    name: str
    memory: float
    """Bytes."""
    operations: float
    """Of bfloat16 products in a second, by the maker."""
    utilisation: float
    """Part of them that training reaches."""
    near: float
    """Bytes a second between GPUs of one machine, in each direction."""
    far: float
    """The same for each GPU between machines."""
    per_machine: int
    """GPUs of a machine."""


def _table_parameters(config: DecoderConfig) -> int:
    """Parameters outside the layers: embeddings, head, final norm."""
    return num_parameters(config, config.full_spec) - block_parameters(config, config.full_spec)


def lora_parameters(config: DecoderConfig, rank: int) -> int:
    """Parameters of low-rank updates beside all linears."""
    return sum(
        rank * (shape.inputs + shape.outputs)
        for layer in config.full_spec.layers
        for shape in linear_shapes(config, layer).values()
    )


def _norms(config: DecoderConfig) -> int:
    """Norm parameters of the usual kind, which train beside low-rank updates."""
    each = config.hidden_size * (2 if config.norm == "layer" else 1)
    return each * (config.num_hidden_layers * (config.pre_norm + config.post_norm) * 2 + 1)


def _trained(config: DecoderConfig, recipe: TrainRecipe) -> int:
    """Parameters that train, with embeddings and head frozen."""
    if recipe.lora_rank is not None:
        return lora_parameters(config, recipe.lora_rank) + _norms(config)
    return block_parameters(config, config.full_spec) + config.hidden_size * (2 if config.norm == "layer" else 1)


def step_operations(config: DecoderConfig, recipe: TrainRecipe, size: float = 1.0) -> float:
    """Floating-point operations of one optimizer step over all processes: student both ways, teacher forward, head.

    Args:
        config: the full model.
        recipe: settings.
        size: mean size of the drawn sub-networks, as a fraction of the layers.
    """
    tokens = recipe.batch_size * recipe.context
    both_ways = step_flops(config, config.full_spec, num_sequences=recipe.batch_size, length=recipe.context)
    student = both_ways * size
    if recipe.lora_rank is not None:
        # frozen weights have no gradient of their own, low-rank updates are trained whole
        student = student * 2 / 3 + 3 * 2 * tokens * lora_parameters(config, recipe.lora_rank) * size
    teacher = both_ways / 3
    # logits of both, and the way back to the hidden states
    head = 3 * 2 * recipe.kl_fraction * tokens * config.vocab_size * config.hidden_size
    metric = 2 * 2 * tokens * config.hidden_size**2
    return student + teacher + head + metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of one process."""

    shards: float
    """Parameters of student and teacher, gradients and moments: its share."""
    gathered: float
    """Embeddings, final norms and heads of both, whole; two layers at a time; a layer's gradients on their way."""
    accumulated: float
    """Whole gradients between the micro batches of a step; none where a step is one micro batch."""
    activations: float
    """Inputs of the layers, which are computed again, and what one layer keeps meanwhile."""

    @property
    def total(self) -> float:
        """All together."""
        return self.shards + self.gathered + self.accumulated + self.activations


def layer_activations(config: DecoderConfig, num_tokens: int) -> int:
    """Bytes that a gated layer keeps for its backward pass in bfloat16, with attention that keeps no scores."""
    rows = config.num_groups * config.query_rows_per_group
    kv_rows = config.kv_rows(config.num_groups)
    # by half: the normalised input; queries, keys, values before and after the rotation, and what the heads give;
    # gate, up and their product; in float32 the residual stream before each half
    kept = 2 * config.hidden_size + 3 * rows + 3 * kv_rows + 3 * config.intermediate_size
    return num_tokens * (2 * kept + 4 * 2 * config.hidden_size)


def held(config: DecoderConfig, recipe: TrainRecipe, num_processes: int) -> Held:
    """Bytes that a process of a bf16 run with `gradient_checkpointing` needs.

    Args:
        config: the full model.
        recipe: settings.
        num_processes: among which parameters are dealt.
    """
    count, trained = num_parameters(config, config.full_spec), _trained(config, recipe)
    layer = block_parameters(config, config.full_spec) / config.num_hidden_layers
    tables = _table_parameters(config)
    is_low_rank = recipe.lora_rank is not None
    # the base in bfloat16, which is the teacher's too; or student and teacher in float32
    weights = count * 2 + trained * 4 if is_low_rank else count * 8
    share = recipe.batch_size // num_processes
    sequences = min(recipe.micro_batch_size, share)
    alone, tokens = num_processes == 1, sequences * recipe.context
    in_layers = trained / config.num_hidden_layers * 4 if is_low_rank else layer * 4
    return Held(
        shards=(weights + 12 * trained) / num_processes,
        # alone, autocast keeps a copy of the student's layers in bfloat16
        gathered=(0 if is_low_rank else 2 * layer * config.num_hidden_layers)
        if alone
        else tables * (2 if is_low_rank else 8) + 2 * layer * 2 + in_layers,
        accumulated=0.0 if alone or share == sequences else 4.0 * trained,
        activations=tokens * config.hidden_size * 4 * config.num_hidden_layers + layer_activations(config, tokens),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """Bytes that one process receives in one optimizer step."""

    gathers: float
    """Weights, for each micro batch: student's layers twice, teacher's once, embeddings and heads once; and the
    teacher's last layer once more, which FSDP2 prefetches in vain."""
    reductions: float
    """Gradients, once a step, in float32."""

    @property
    def total(self) -> float:
        """All together."""
        return self.gathers + self.reductions


def moved(config: DecoderConfig, recipe: TrainRecipe, num_processes: int) -> Moved:
    """Bytes that a process receives."""
    others = (num_processes - 1) / num_processes
    share = recipe.batch_size // num_processes
    rounds = share // min(recipe.micro_batch_size, share)
    layers, tables = block_parameters(config, config.full_spec), _table_parameters(config)
    low = 2 if recipe.precision == "bf16" else 4
    if recipe.lora_rank is not None:
        in_layers = lora_parameters(config, recipe.lora_rank) * 4
        # teacher and student share the tables and the linears; the teacher borrows the whole group
        each = 3 * (layers * low + in_layers) + tables * low
    else:
        each = (3 + 1 / config.num_hidden_layers) * layers * low + 2 * tables * 4
    return Moved(gathers=rounds * each * others, reductions=4.0 * _trained(config, recipe) * others)

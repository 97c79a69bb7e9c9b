"""How large the reproduction runs: every number of the scales, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from experiments.reproduction.models import FamilyName, Shape
from flextron.model.config import DecoderConfig
from flextron.model.cost import layer_parameters
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

__all__ = ["ELASTIC_FRACTION", "SCALES", "Scale", "full_size_space", "uniform_widths"]

ELASTIC_FRACTION = 0.0763
"""Training tokens of every post-training method over those of pretraining: the paper's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """One scale of the experiment."""

    name: str
    shapes: Mapping[FamilyName, Shape]
    """The base model of each family."""
    seeds: Mapping[FamilyName, int]
    """How often each family runs: seeds 0, 1, …"""
    tokens: int
    """T: pretraining tokens of the base and of each variant."""
    vocab_size: int
    context: int
    """Tokens of a window, in training and validation."""
    num_search_tokens: int
    """Tokens on which sub-networks are chosen."""
    num_validation_tokens: int
    num_calibration_tokens: int
    """Training tokens on which importance is measured."""
    batch_size: int
    """Sequences of a pretraining step."""
    elastic_batch_size: int
    """Sequences of a post-training step, of all methods."""
    lr: Mapping[FamilyName, float]
    """Peak rate of pretraining."""
    elastic_lr: Mapping[FamilyName, float]
    """Peak rate of post-training, of all methods."""
    width_step: int
    """MLP widths are multiples of this."""
    num_candidates: int
    """Sub-networks whose loss on the search windows is measured for each size."""
    narrowest_mlp: float
    """Least MLP width of a nested model's layers, as a fraction of the full one."""
    narrowest_attention: float
    """Likewise for attention groups."""
    num_skippable: int
    """Layers that may be skipped, half of them at once: the least important ones but for the first and the last."""
    lm_weight: float = 1.0
    """Of the next-token loss beside the distillation, for Flextron."""
    sizes: tuple[float, ...] = (0.75, 0.55, 0.4)
    """Compared sizes, as fractions of the base's block parameters."""
    ablation_size: float = 0.55
    """The size of the ablations."""
    joint_fraction: float = 0.7
    """Part of Flextron's tokens that its last stage takes."""
    latency_repeats: int = 15
    precision: Literal["fp32", "bf16"] = "fp32"

    def steps(self, fraction: float) -> int:
        """Post-training steps that take at most a fraction of the post-training tokens; at least one."""
        per_step = self.elastic_batch_size * self.context
        return max(1, int(fraction * ELASTIC_FRACTION * self.tokens) // per_step)

    @property
    def elastic_steps(self) -> int:
        """Steps of a whole post-training run."""
        return self.steps(1.0)

    @property
    def joint_steps(self) -> int:
        """Steps of Flextron's last stage, of those."""
        return self.steps(self.joint_fraction)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def uniform_widths(config: DecoderConfig, size: float, width_step: int) -> SubnetSpec:
    """Equal layers whose parameters are nearest to a fraction of the full ones', with about as large a part of groups.

    This is the shape of a variant trained end to end, and of what pruning to a size leaves.
    """
    groups = max(1, round(size * config.num_groups))
    wanted = size * layer_parameters(config, config.full_spec.layers[0])

    def miss(width: int) -> float:
        return abs(layer_parameters(config, LayerSpec(intermediate_size=width, num_groups=groups)) - wanted)

    width = min(range(width_step, config.intermediate_size + 1, width_step), key=miss)
    return SubnetSpec.uniform(num_hidden_layers=config.num_hidden_layers, intermediate_size=width, num_groups=groups)


def full_size_space(config: DecoderConfig, widths: SubnetSpec) -> SearchSpace:
    """The space of a model that has no sub-networks."""
    layer = widths.layers[0]
    return SearchSpace(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_sizes=(layer.intermediate_size,),
        num_groups=(layer.num_groups,),
    )


_SMOKE = Shape(hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
_CPU = Shape(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
_PAPER = Shape(hidden_size=40, intermediate_size=96, num_hidden_layers=4, num_attention_heads=5, num_key_value_heads=5)
_GPU = Shape(
    hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=6
)
_CPU_GPT = Shape(
    hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4
)
_GPU_GPT = Shape(
    hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6
)

_CPU_SCALE = Scale(
    name="cpu",
    shapes={"llama": _CPU, "gpt2": _CPU_GPT},
    seeds={"llama": 3, "gpt2": 1},
    tokens=4_000_000,
    vocab_size=512,
    context=128,
    num_search_tokens=8_192,
    num_validation_tokens=65_536,
    num_calibration_tokens=8_192,
    batch_size=16,
    elastic_batch_size=8,
    lr={"llama": 6e-3, "gpt2": 6e-3},
    elastic_lr={"llama": 2e-3, "gpt2": 1e-3},
    width_step=16,
    num_candidates=16,
    narrowest_mlp=0.25,
    narrowest_attention=0.5,
    num_skippable=0,  # of four layers none can be missed
)

SCALES: Mapping[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale(
            name="smoke",
            shapes={"llama": _SMOKE, "gpt2": _SMOKE},
            seeds={"llama": 1, "gpt2": 0},
            tokens=60_000,
            vocab_size=384,
            context=32,
            num_search_tokens=512,
            num_validation_tokens=1024,
            num_calibration_tokens=512,
            batch_size=8,
            elastic_batch_size=8,
            lr={"llama": 8e-3, "gpt2": 8e-3},
            elastic_lr={"llama": 2e-3, "gpt2": 2e-3},
            width_step=8,
            num_candidates=2,
            narrowest_mlp=0.0,
            narrowest_attention=0.0,
            num_skippable=2,
            latency_repeats=1,
        ),
        _CPU_SCALE,
        # 502 tokens a parameter, so that post-training has 38, nearly the paper's 42
        replace(
            _CPU_SCALE,
            name="paper",
            shapes={"llama": _PAPER},
            seeds={"llama": 1},
            tokens=36_000_000,
            lr={"llama": 6e-3},
            elastic_lr={"llama": 2e-3},
        ),
        Scale(
            name="gpu",
            shapes={"llama": _GPU, "gpt2": _GPU_GPT},
            seeds={"llama": 3, "gpt2": 1},
            tokens=50_000_000,
            vocab_size=4096,
            context=256,
            num_search_tokens=65_536,
            num_validation_tokens=262_144,
            num_calibration_tokens=16_384,
            batch_size=128,
            elastic_batch_size=32,
            lr={"llama": 2e-3, "gpt2": 2e-3},
            elastic_lr={"llama": 6e-4, "gpt2": 6e-4},
            width_step=64,
            num_candidates=24,
            narrowest_mlp=0.25,
            narrowest_attention=0.3,
            num_skippable=2,
            precision="bf16",
        ),
    )
}

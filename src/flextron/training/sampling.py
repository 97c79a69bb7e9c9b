"""Which sub-networks a training step runs: a function of the seed and the step alone, so that resuming needs no state.

Sizes are drawn first, as fractions of the layers' parameters, and stratified within a step, which makes a sandwich of
large and small ones. Most sub-networks are then *guided*: the best of their size by the sensitivities of the original,
each of which is perturbed at random. They are what a search will want later, and training the rest of an astronomic
space evenly would starve them. A few are plain random ones, so that no choice stays untrained.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from flextron.model.config import DecoderConfig
from flextron.model.cost import layer_parameters
from flextron.routing.allocate import Allocator
from flextron.routing.sensitivity import Sensitivity
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec
from flextron.training.recipe import TrainRecipe

__all__ = ["SubnetSampler", "random_subnet"]

_SPREAD = 0.25
"""Standard deviation of a layer's relative width around its sub-network's, in random sub-networks."""
_NOISE = 0.5
"""Standard deviation of the logarithm of a guided sub-network's sensitivities around the measured ones."""
_MOST_OVERHEAD = 0.6
"""Largest cost of a kept layer whatever its widths, over its parameters: what launches and small operations cost."""


def random_subnet(space: SearchSpace, size: float, rng: random.Random) -> SubnetSpec:
    """A heterogeneous sub-network around a relative size.

    Args:
        space: the choices.
        size: 0 for the smallest widths, 1 for the full ones.
        rng: source of randomness.
    """
    most = min(1.0, max(0.0, 1 - size)) * space.max_skipped_layers
    num_skipped = min(space.max_skipped_layers, round(rng.uniform(0, 2 * most)))
    # the least important layers are the likeliest to go
    weights = [1 / (1 + rank) for rank in range(len(space.skippable_layers))]
    keys = [(rng.random() ** (1 / w), i) for w, i in zip(weights, space.skippable_layers, strict=True)]
    skipped = {i for _, i in sorted(keys, reverse=True)[:num_skipped]}
    return space.scattered(size, _SPREAD, skipped, rng)


def _perturbed(sensitivity: Sensitivity, rng: random.Random) -> Sensitivity:
    """Each half layer's costs times a random factor."""

    def scaled(tables: tuple[dict[int, float], ...]) -> tuple[dict[int, float], ...]:
        factors = [rng.lognormvariate(0, _NOISE) for _ in tables]
        return tuple({w: f * c for w, c in t.items()} for f, t in zip(factors, tables, strict=True))

    return Sensitivity(mlp=scaled(sensitivity.mlp), attention=scaled(sensitivity.attention))


@dataclass(frozen=True, kw_only=True, slots=True)
class SubnetSampler:
    """Draws the sub-networks of a step."""

    config: DecoderConfig
    space: SearchSpace
    sensitivity: Sensitivity
    recipe: TrainRecipe
    num_steps: int

    def floor(self, step: int) -> float:
        """Smallest size allowed at a step: falls from 1 to `min_size` over the annealed part of the run."""
        annealed = self.recipe.anneal_fraction * self.num_steps
        progress = min(1.0, (step + 1) / annealed) if annealed else 1.0
        return 1 - (1 - self.recipe.min_size) * progress

    def guided(self, size: float, rng: random.Random) -> SubnetSpec:
        """The best sub-network of about `size` by perturbed sensitivities.

        Which widths a search wants depends on the device: where a layer costs time whatever its widths, skipping some
        beats narrowing all. So that overhead is drawn too, and the weight of skipped layers in the loss model.
        """
        full = layer_parameters(self.config, self.space.full.layers[0])
        overhead = rng.uniform(0, _MOST_OVERHEAD) * full

        def cost(layer: LayerSpec) -> float:
            return 0.0 if layer.is_skipped else layer_parameters(self.config, layer) + overhead

        weights = (1.0, 1.0, rng.lognormvariate(0, 2 * _NOISE))
        allocator = Allocator(self.space, _perturbed(self.sensitivity, rng), cost, weights)
        return allocator.within(size * (full + overhead) * self.space.num_hidden_layers)

    def draw(self, step: int, micro_step: int, count: int) -> list[SubnetSpec]:
        """The sub-networks of one micro batch."""
        rng = random.Random(f"{self.recipe.seed}/{step}/{micro_step}")
        floor = self.floor(step)
        out = []
        for j in range(count):
            size = floor + (1 - floor) * ((count - 1 - j + rng.random()) / count) ** (1 / self.recipe.tilt)
            kind = rng.random()
            if kind < self.recipe.full_probability:
                out.append(self.space.full)
            elif kind < self.recipe.full_probability + self.recipe.random_probability:
                out.append(random_subnet(self.space, size, rng))
            else:
                out.append(self.guided(size, rng))
        return out

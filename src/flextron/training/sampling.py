"""Which sub-networks a training step runs: a function of the seed and the step alone, so that resuming needs no state.

Sizes are drawn first, as fractions of the layers' parameters, and stratified within a step, which makes a sandwich of
large and small ones. Most sub-networks are then *guided*: the best of their size by the sensitivities of the original,
each of which is perturbed at random. They are what a search will want later, and training the rest of an astronomic
space evenly would starve them. A few are plain random ones, so that no choice stays untrained. The other kinds of
sampling are those of published elastic networks: uniform widths (MatFormer) and random ones (SortedNet).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from flextron.errors import FlextronError
from flextron.model.config import DecoderConfig
from flextron.model.cost import layer_parameters
from flextron.routing.allocate import Allocator
from flextron.routing.sensitivity import Sensitivity
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec
from flextron.training.recipe import TrainRecipe

__all__ = ["SubnetSampler", "random_subnet", "uniform_subnet"]

T = TypeVar("T")

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


def uniform_subnet(config: DecoderConfig, space: SearchSpace, size: float) -> SubnetSpec:
    """The largest sub-network of equal layers within a size; the smallest such one if none is.

    Each MLP width goes with the number of groups that is the nearest to the same fraction of all.

    Args:
        config: config of the decoder.
        space: the choices.
        size: limit, as a fraction of the layers' parameters.
    """
    widest, most = space.intermediate_sizes[-1], space.num_groups[-1]
    limit = size * layer_parameters(config, space.full.layers[0])
    pairs = [(w, min(space.num_groups, key=lambda g: abs(g / most - w / widest))) for w in space.intermediate_sizes]
    fitting = [
        (w, g)
        for w, g in pairs
        if layer_parameters(config, LayerSpec(intermediate_size=w, num_groups=g)) <= limit * (1 + 1e-9)
    ]
    return space.uniform(*(fitting[-1] if fitting else pairs[0]))


def _evenly(choices: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` of the choices in random order, none drawn again before all others were."""
    out: list[T] = []
    while len(out) < count:
        out += rng.sample(choices, min(len(choices), count - len(out)))
    return out


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
    sensitivity: Sensitivity | None
    """Guides the drawn sub-networks; None where the recipe or `specs` draws others."""
    recipe: TrainRecipe
    num_steps: int
    specs: tuple[SubnetSpec, ...] = ()
    """Sub-networks to draw from evenly, instead of by the recipe, where there are any."""

    def floor(self, step: int) -> float:
        """Smallest size allowed at a step: falls from 1 to `min_size` over the annealed part of the run."""
        annealed = self.recipe.anneal_fraction * self.num_steps
        progress = min(1.0, (step + 1) / annealed) if annealed else 1.0
        smallest = self.recipe.min_size if self.recipe.sizes is None else min(self.recipe.sizes)
        return 1 - (1 - smallest) * progress

    def guided(self, size: float, rng: random.Random) -> SubnetSpec:
        """The best sub-network of about `size` by perturbed sensitivities.

        Which widths a search wants depends on the device: where a layer costs time whatever its widths, skipping some
        beats narrowing all. So that overhead is drawn too, and the weight of skipped layers in the loss model.
        """
        if self.sensitivity is None:
            raise FlextronError("guided sub-networks need sensitivities; measure them first")
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
        if self.specs:
            return _evenly(self.specs, count, rng)
        floor = self.floor(step)
        listed = None if self.recipe.sizes is None else _evenly(self.recipe.sizes, count, rng)
        out = []
        for j in range(count):
            if listed is None:
                size = floor + (1 - floor) * ((count - 1 - j + rng.random()) / count) ** (1 / self.recipe.tilt)
            else:
                size = max(floor, listed[j])
            out.append(self._of_kind(size, rng))
        return out

    def _of_kind(self, size: float, rng: random.Random) -> SubnetSpec:
        """A sub-network of about `size`, or now and then the full one or a random one."""
        recipe = self.recipe
        if size == 1:
            return self.space.full
        kind = rng.random()
        if kind < recipe.full_probability:
            return self.space.full
        if recipe.sampling == "random" or (
            recipe.sampling == "guided" and kind < recipe.full_probability + recipe.random_probability
        ):
            return random_subnet(self.space, size, rng)
        return self.guided(size, rng) if recipe.sampling == "guided" else uniform_subnet(self.config, self.space, size)

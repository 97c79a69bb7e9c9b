"""Which sub-networks a training step runs: a function of the seed and the step alone, so that resuming needs no state.

Sizes are drawn first and widths around them, layer by layer: independent draws in every layer would all come out at the
same middling size. Within a step the sizes are stratified, which makes a sandwich of large and small ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from flextron.spec import LayerSpec, SearchSpace, SubnetSpec
from flextron.training.recipe import TrainRecipe

__all__ = ["SubnetSampler", "random_subnet"]

_SPREAD = 0.25
"""Standard deviation of a layer's relative size around its sub-network's."""


def _pick(choices: tuple[int, ...], size: float) -> int:
    """The choice at a relative size: 0 is the smallest, 1 the full one."""
    return choices[round(min(max(size, 0.0), 1.0) * (len(choices) - 1))]


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
    layers = []
    for i in range(space.num_hidden_layers):
        neurons = _pick(space.intermediate_sizes, rng.gauss(size, _SPREAD))
        groups = _pick(space.num_groups, rng.gauss(size, _SPREAD))
        keep = i not in skipped
        layers.append(LayerSpec(intermediate_size=neurons * keep, num_groups=groups * keep))
    return SubnetSpec(layers=tuple(layers))


@dataclass(frozen=True, slots=True)
class SubnetSampler:
    """Draws the sub-networks of a step."""

    space: SearchSpace
    recipe: TrainRecipe
    num_steps: int

    def floor(self, step: int) -> float:
        """Smallest relative size allowed at a step: falls from 1 to 0 over the annealed part of the run."""
        annealed = self.recipe.anneal_fraction * self.num_steps
        return max(0.0, 1 - (step + 1) / annealed) if annealed else 0.0

    def draw(self, step: int, micro_step: int, count: int) -> list[SubnetSpec]:
        """The sub-networks of one micro batch."""
        rng = random.Random(f"{self.recipe.seed}/{step}/{micro_step}")
        floor = self.floor(step)
        out = []
        for j in range(count):
            kind = rng.random()
            size = floor + (1 - floor) * ((j + rng.random()) / count) ** self.recipe.tilt
            if kind < self.recipe.full_probability:
                out.append(self.space.full)
            elif kind > 1 - self.recipe.smallest_probability:
                out.append(self._smallest(floor))
            else:
                out.append(random_subnet(self.space, size, rng))
        rng.shuffle(out)
        return out

    def _smallest(self, floor: float) -> SubnetSpec:
        skip = self.space.skippable_layers[: round((1 - floor) * self.space.max_skipped_layers)]
        widths = _pick(self.space.intermediate_sizes, floor), _pick(self.space.num_groups, floor)
        return self.space.uniform(*widths, skip)

"""Training the static router along with the model (Flextron, 3.3): the second stage after `training/routers.py`.

Each step runs sub-networks that the router draws for random targets. The model learns by distillation as in elastic
training; the router by straight-through gates on what each half layer adds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron.routing.latency import LatencyTable
from flextron.routing.routers import Choices, StaticRouter, latency_ms, straight_through
from flextron.training.dealing import RoutedDraw
from flextron.training.router_recipe import RouterRecipe

__all__ = ["JointRouting", "latency_loss"]


def latency_loss(milliseconds_B: Tensor, wanted_B: Tensor, dead_zone: float) -> Tensor:
    """Mean relative deviation beyond the dead zone; a scalar."""
    return ((milliseconds_B / wanted_B - 1).abs() - dead_zone).clamp_min(0).mean()


@dataclass(frozen=True, kw_only=True)
class JointRouting:
    """Draws sub-networks for random targets with a router that trains along: the second stage, for `train`."""

    router: StaticRouter
    table: LatencyTable
    recipe: RouterRecipe
    targets: tuple[float, ...] = ()
    """Targets to draw from evenly, instead of any within reach."""
    full_probability: float = 0.2
    """Chance of a drawn sub-network to be the full one, so that it does not decay."""

    def draw(self, step: int, micro_step: int, count: int) -> RoutedDraw:
        """The sub-networks of one micro batch, with gates of value 1 that carry gradients to the router."""
        rng = random.Random(f"joint/{self.recipe.seed}/{step}/{micro_step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        asked = self._targets(count, rng)
        targets = torch.tensor(asked, device=self.router.mlp.out_bias.device)
        # the sharpness that the first stage ended with; at its last temperature no gradient would be left
        logits = self.router(targets)
        noisy = logits.noisy(self.recipe.scale[1], logits.gumbel(generator))
        soft = noisy.relaxed(1.0, 1.0, None)
        specs = self.router.within(noisy, asked, self.table)
        choices = straight_through(soft, self.router.one_hot(specs))
        gates: list[Tensor | None] = list(_gates(choices))
        for j in range(count):
            if asked[j] == 1 or rng.random() < self.full_probability:
                specs[j], gates[j] = self.router.space.full, None
        wanted = targets * self.table.predict_ms(self.router.space.full)
        loss = latency_loss(latency_ms(soft, self.table), wanted, self.recipe.dead_zone)
        return RoutedDraw(specs=specs, gates=gates, loss=self.recipe.latency_weight * loss)

    def _targets(self, count: int, rng: random.Random) -> list[float]:
        """Listed ones in turn, or stratified over the range."""
        if self.targets:
            return [
                self.targets[i % len(self.targets)] for i in rng.sample(range(max(count, len(self.targets))), count)
            ]
        lowest = max(self.recipe.min_target, self.table.predict(self.router.space.smallest))
        return [lowest + (1 - lowest) * (count - 1 - j + rng.random()) / count for j in range(count)]


def _gates(choices: Choices) -> Tensor:
    """Straight-through probabilities of what was chosen, attention and MLP of each layer, (B, L, 2)."""
    kept_BL = choices.keep_BL2[..., 0]
    attention_BL, mlp_BL = (
        part.gather(-1, part.detach().argmax(-1, keepdim=True)).squeeze(-1)
        for part in (choices.attention_BLG, choices.mlp_BLW)
    )
    return torch.stack((attention_BL * kept_BL, mlp_BL * kept_BL), -1)

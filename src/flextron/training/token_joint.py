"""The token router's second stage: through the real loss, with the model frozen or at a low rate.

Gumbel noise samples a choice, which runs; a straight-through gate of value 1 on its output carries the gradient of the
choice's probability. A latency loss holds the average cost at the target's.

Shapes: N tokens, D hidden size, C choices of width (0 and the space's).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.errors import FlextronError
from flextron.losses.vocabulary import forward_kl
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.routing.latency import LatencyTable
from flextron.routing.routers import gumbel_like
from flextron.routing.token_router import TokenRouter
from flextron.spec import SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.token_recipe import TokenRouterRecipe

__all__ = ["JointStage", "SampledRouter"]


class SampledRouter:
    """The router while it trains: Gumbel-softmax samples, and straight-through gates (see `TokenChoice`)."""

    def __init__(
        self, router: TokenRouter, target: float, price: float, *, tau: float, logit_scale: float, seed: str
    ) -> None:
        """Fix what a step fixes.

        Args:
            router: gets the gradients.
            target: fraction of the full network's decode time.
            price: price of time, in logits.
            tau: temperature of the softmax through which gradients flow.
            logit_scale: scale of the priced logits against the noise.
            seed: seed of the noise, together with the layer; recomputation in a backward pass must find the same.
        """
        self._router, self._target, self._price = router, target, price
        self.tau, self.logit_scale, self.seed = tau, logit_scale, seed
        self.spent: dict[int, Tensor] = {}
        """Mean cost of the choices by layer, as a fraction of the full decode step; it carries gradients."""

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenChoice`; no gradient flows to the hidden states."""
        router = self._router
        scores_NC = router.logits(layer, x_ND.detach(), self._target) - self._price * router.costs_C
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{layer}").getrandbits(63))
        noise_NC = gumbel_like(scores_NC, generator)
        soft_NC = torch.softmax((self.logit_scale * scores_NC + noise_NC) / self.tau, -1)
        chosen_N = soft_NC.argmax(-1)
        hard_NC = F.one_hot(chosen_N, soft_NC.shape[-1]) + (soft_NC - soft_NC.detach())
        self.spent[layer] = (hard_NC * router.costs_C).sum(-1).mean()
        gates_N = hard_NC.gather(1, chosen_N[:, None]).squeeze(1)
        return router.widths_C[chosen_N], gates_N.to(x_ND.dtype)

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        """See `TokenRouter.check`."""
        self._router.check(config, spec)


@dataclass(frozen=True, kw_only=True, slots=True)
class JointStage:
    """Everything that the second stage needs."""

    decoder: Decoder
    teacher: Decoder
    router: TokenRouter
    table: LatencyTable
    static_specs: Mapping[float, SubnetSpec]
    recipe: TokenRouterRecipe

    def routers(self, step: int, count: int) -> dict[float, SampledRouter]:
        """Routers of a step by target: as many targets as are asked for, but no more than there are."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}/{step}")
        targets = rng.sample(sorted(self.static_specs), min(count, len(self.static_specs)))
        progress = step / max(1, recipe.joint_steps - 1)
        tau = recipe.tau_start * (recipe.tau_end / recipe.tau_start) ** progress
        scale = recipe.logit_scale_start * (recipe.logit_scale_end / recipe.logit_scale_start) ** progress
        return {
            t: SampledRouter(
                self.router, t, self.router.price(t), tau=tau, logit_scale=scale, seed=f"{recipe.seed}/{step}/{t}"
            )
            for t in targets
        }

    def losses(self, tokens_BT: Tensor, step: int) -> dict[str, Tensor]:
        """KL, latency loss, their sum, and the average cost over the targets'."""
        tokens_BT = tokens_BT.to(self.decoder.device)
        routers = self.routers(step, min(self.recipe.targets_per_batch, len(tokens_BT)))
        specs = [self.static_specs[t] for t in routers]
        with torch.no_grad():
            teacher_h_ND = self.teacher(Batch.padded(tokens_BT, self.teacher.widths))
        h_ND = self.decoder(Batch.dealt(tokens_BT, specs, routers=list(routers.values())))
        kl = forward_kl(
            h_ND,
            self.decoder.head_weight,
            teacher_h_ND,
            self.teacher.head_weight,
            cap=self.decoder.config.logits_cap,
        )
        ratios = torch.stack([self._cost_ratio(r, s) for r, s in zip(routers.values(), specs, strict=True)])
        latency = F.relu((ratios - 1).abs() - self.recipe.dead_zone).mean()
        loss = kl + self.recipe.latency_weight * latency
        return {"loss": loss, "kl": kl, "latency": latency, "cost_ratio": ratios.mean()}

    def _cost_ratio(self, choice: SampledRouter, spec: SubnetSpec) -> Tensor:
        """Average cost of the sampled choices over the static sub-network's."""
        static = self.table.predict(spec)
        own = sum(self.router.mlp_costs[spec.layers[i].intermediate_size] for i in choice.spent)
        return (static - own + torch.stack(list(choice.spent.values())).sum()) / static

    def run(self, blocks: TokenBlocks, on_step: Callable[[dict[str, float]], None]) -> None:
        """Train in place."""
        recipe = self.recipe
        groups = [{"params": list(self.router.parameters()), "peak": recipe.router_lr}]
        if recipe.model_lr:
            frozen = ("embedding.", "positions.", "head.")
            trained = [p for name, p in self.decoder.named_parameters() if not name.startswith(frozen)]
            groups.append({"params": [p.requires_grad_() for p in trained], "peak": recipe.model_lr})
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(recipe.joint_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / recipe.joint_steps))
            losses = self.losses(blocks.batch(step, recipe.batch_size), step)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
            if not torch.isfinite(norm):
                raise FlextronError(f"the gradient of joint step {step} is not finite; lower router_lr or model_lr")
            optimizer.step()
            optimizer.zero_grad()
            on_step({name: float(value.detach()) for name, value in losses.items()})
        self.decoder.requires_grad_(False)

"""The token router's first stage: regression of what widths cost tokens on hidden states, with the model frozen.

A label is the square of a nearly Gaussian number: its expectation times a heavy-tailed random factor. So the regression
is that for multiplicative noise, the gamma deviance log m + y / m, whose minimum is the conditional mean m = E[y | x];
the mean of log y would miss it, and a squared error would hear only the outliers.

Shapes: N tokens, D hidden size, C choices of width (0 and the space's).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.decoder import Decoder
from flextron.routing.token_router import TokenRouter
from flextron.spec import SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.token_costs import TokenCosts, token_costs
from flextron.training.token_recipe import TokenRouterRecipe

__all__ = ["warm_start"]

_SMALLEST = 1e-12
"""Smallest mean cost, in nats: a width that changes nothing still has a logarithm."""


@dataclass(frozen=True)
class _Labelled:
    """Tokens of one target."""

    target: float
    layers: dict[int, TokenCosts]
    """Those that run."""

    @cached_property
    def means(self) -> dict[int, Tensor]:
        """Mean cost of each narrower width, by layer, (C - 1,)."""
        return {i: layer.costs_NC.mean(0).clamp(min=_SMALLEST) for i, layer in self.layers.items()}

    @property
    def num_tokens(self) -> int:
        return len(next(iter(self.layers.values())).x_ND)


def _measure(
    decoder: Decoder,
    router: TokenRouter,
    static_specs: Mapping[float, SubnetSpec],
    blocks: TokenBlocks,
    recipe: TokenRouterRecipe,
) -> list[_Labelled]:
    """Inputs and costs of the recipe's tokens in each target's static sub-network."""
    generator = torch.Generator().manual_seed(recipe.seed)
    # each block once at most: a block that came twice could be both trained on and held out
    num_blocks = min(math.ceil(recipe.warm_tokens / blocks.context), blocks.num_blocks)
    tokens_BT = blocks.batch(0, num_blocks)
    out = []
    for target, spec in static_specs.items():
        pieces = [
            token_costs(decoder, part, spec, router.space, num_draws=recipe.num_draws, generator=generator)
            for part in tokens_BT.split(recipe.batch_size)
        ]
        layers = {
            i: TokenCosts(
                x_ND=torch.cat([p[i].x_ND for p in pieces]), costs_NC=torch.cat([p[i].costs_NC for p in pieces])
            )
            for i in pieces[0]
        }
        out.append(_Labelled(target, layers))
    return out


@torch.no_grad()
def _start_at_means(router: TokenRouter, sets: Sequence[_Labelled]) -> None:
    """Let each layer know the size of its inputs, and predict its mean costs whatever it reads."""
    router.unit.fill_(1.0)
    for i, second in enumerate(router.second):
        costs = [s.layers[i].costs_NC for s in sets if i in s.layers]
        assert isinstance(second, torch.nn.Linear)
        second.weight.zero_()
        if costs:
            squares = [s.layers[i].x_ND.float().square().mean() for s in sets if i in s.layers]
            router.input_rms_L[i] = torch.stack(squares).mean().sqrt()
            second.bias.copy_(torch.cat(costs).mean(0).clamp(min=_SMALLEST).log())


def _deviance(router: TokenRouter, labelled: _Labelled, rows: Tensor) -> Tensor:
    """Mean over layers, choices and tokens of log m + y / m, less what predicting 1 with y of mean 1 would give."""
    terms = []
    for i, layer in labelled.layers.items():
        means_C = labelled.means[i]
        log_m = router.log_costs(i, layer.x_ND[rows], labelled.target) - means_C.log()
        terms.append((log_m + layer.costs_NC[rows] / means_C * torch.exp(-log_m)).mean() - 1)
    return torch.stack(terms).mean()


def warm_start(
    decoder: Decoder,
    router: TokenRouter,
    static_specs: Mapping[float, SubnetSpec],
    blocks: TokenBlocks,
    recipe: TokenRouterRecipe,
    *,
    on_epoch: Callable[[dict[str, float]], None],
) -> None:
    """Train the router's layers, in place, to predict what widths cost; its unit becomes one nat.

    Args:
        decoder: the model, frozen.
        router: to be trained.
        static_specs: by target, the sub-networks in which costs are measured.
        blocks: text.
        recipe: settings.
        on_epoch: gets `deviance` (training tokens) and `heldout_deviance`, below 0 where hidden states tell more than
            the mean of layer and width.

    Raises:
        FlextronError: no layer has an MLP in any of the sub-networks.
    """
    sets = [s for s in _measure(decoder, router, static_specs, blocks, recipe) if s.layers]
    if not sets:
        raise FlextronError("the static sub-networks skip all MLPs; give targets that keep some")
    _start_at_means(router, sets)
    optimizer = torch.optim.AdamW(router.parameters(), lr=recipe.warm_lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(recipe.seed + 1)
    num_heldout = max(1, round(recipe.warm_heldout_fraction * sets[0].num_tokens))
    # whole runs of text are held out, for neighbouring tokens are alike
    heldout = torch.arange(sets[0].num_tokens - num_heldout, sets[0].num_tokens)
    rows = [(s, part) for s in sets for part in _parts(s.num_tokens - num_heldout, recipe.warm_batch_tokens)]
    best, best_state = _evaluate(router, sets, heldout), copy.deepcopy(router.state_dict())
    for epoch in range(recipe.warm_epochs):
        total = 0.0
        shuffled = torch.randperm(sets[0].num_tokens - num_heldout, generator=order)
        for step, k in enumerate(torch.randperm(len(rows), generator=order).tolist()):
            labelled, part = rows[k]
            progress = (epoch + step / len(rows)) / recipe.warm_epochs
            optimizer.param_groups[0]["lr"] = recipe.warm_lr * 0.5 * (1 + math.cos(math.pi * progress))
            loss = _deviance(router, labelled, shuffled[part])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach()) / len(rows)
        found = _evaluate(router, sets, heldout)
        if found < best:
            best, best_state = found, copy.deepcopy(router.state_dict())
        on_epoch({"deviance": total, "heldout_deviance": found})
    router.load_state_dict(best_state)


def _parts(num_tokens: int, size: int) -> list[slice]:
    return [slice(a, min(a + size, num_tokens)) for a in range(0, num_tokens, size)]


@torch.no_grad()
def _evaluate(router: TokenRouter, sets: Sequence[_Labelled], rows: Tensor) -> float:
    return sum(float(_deviance(router, s, rows)) for s in sets) / len(sets)

"""The static router: from any latency target between smallest and full network to a sub-network (Flextron, 3.3).

For each layer and axis (MLP width, attention groups, kept or skipped) a two-layer network maps the target to logits
over the choices. In training the choices are drawn with Gumbel noise; in use the most likely sub-network within the
budget is taken, by the latency table of whatever device runs it.

Shapes: B targets, L layers, C choices of an axis, R hidden size of the router.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flextron.errors import FlextronError
from flextron.routing.allocate import Allocator
from flextron.routing.latency import LatencyTable
from flextron.routing.sensitivity import Sensitivity
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

__all__ = ["Choices", "StaticRouter", "gumbel_like", "latency_ms", "straight_through"]


def gumbel_like(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise of the same shape, on the same device; drawn on the CPU, so that all devices see the same."""
    uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log().to(logits.device)


@dataclass(frozen=True)
class Choices:
    """Logits, probabilities or one-hot choices: for each target and layer, over the choices of each axis."""

    mlp_BLW: Tensor
    attention_BLG: Tensor
    keep_BL2: Tensor
    """Kept, skipped."""

    @property
    def features_BF(self) -> Tensor:
        """What a surrogate sees of probabilities: those of each width times that of keeping the layer."""
        keep = self.keep_BL2[..., :1]
        parts = (self.mlp_BLW * keep, self.attention_BLG * keep, keep)
        return torch.cat([p.flatten(1) for p in parts], 1)

    def noisy(self, scale: float, noise: Choices) -> Choices:
        """Logits times `scale`, with noise."""
        return Choices(
            self.mlp_BLW * scale + noise.mlp_BLW,
            self.attention_BLG * scale + noise.attention_BLG,
            self.keep_BL2 * scale + noise.keep_BL2,
        )

    def relaxed(self, tau: float, scale: float, noise: Choices | None) -> Choices:
        """Probabilities of logits times `scale`, with noise, at temperature `tau`."""

        def soften(logits: Tensor, gumbel: Tensor | None) -> Tensor:
            return torch.softmax((logits * scale + (0 if gumbel is None else gumbel)) / tau, -1)

        added = (None, None, None) if noise is None else (noise.mlp_BLW, noise.attention_BLG, noise.keep_BL2)
        parts = (self.mlp_BLW, self.attention_BLG, self.keep_BL2)
        return Choices(*(soften(logits, g) for logits, g in zip(parts, added, strict=True)))

    def gumbel(self, generator: torch.Generator) -> Choices:
        """Noise of the same shapes."""
        parts = (self.mlp_BLW, self.attention_BLG, self.keep_BL2)
        return Choices(*(gumbel_like(part, generator) for part in parts))


class _Bank(nn.Module):
    """One two-layer network a layer: target to logits; all layers at once."""

    def __init__(self, num_layers: int, num_choices: int, hidden_size: int) -> None:
        super().__init__()
        self.into_weight = nn.Parameter(torch.empty(num_layers, hidden_size).uniform_(-2, 2))
        self.into_bias = nn.Parameter(torch.empty(num_layers, hidden_size).uniform_(-1, 1))
        self.out_weight = nn.Parameter(torch.randn(num_layers, hidden_size, num_choices) * 0.1 / math.sqrt(hidden_size))
        self.out_bias = nn.Parameter(torch.zeros(num_layers, num_choices))

    def forward(self, targets_B: Tensor) -> Tensor:
        centred = 2 * targets_B - 1
        hidden_BLR = F.leaky_relu(centred[:, None, None] * self.into_weight + self.into_bias)
        return torch.einsum("blr,lrc->blc", hidden_BLR, self.out_weight) + self.out_bias


class StaticRouter(nn.Module):
    """Logits over the choices of every layer and axis, from a target alone."""

    def __init__(self, space: SearchSpace, hidden_size: int = 32) -> None:
        """Allocate for the choices of `space`."""
        super().__init__()
        self.space = space
        layers = space.num_hidden_layers
        self.mlp = _Bank(layers, len(space.intermediate_sizes), hidden_size)
        self.attention = _Bank(layers, len(space.num_groups), hidden_size)
        self.keep = _Bank(layers, 2, hidden_size)
        fixed = [i for i in range(layers) if i not in space.skippable_layers or not space.max_skipped_layers]
        bar_L2 = torch.zeros(layers, 2)
        bar_L2[fixed, 1] = -1e4
        self.register_buffer("_bar_L2", bar_L2, persistent=False)

    @classmethod
    def from_tensors(cls, space: SearchSpace, tensors: Mapping[str, Tensor]) -> StaticRouter:
        """Rebuild from a `state_dict`.

        Raises:
            FlextronError: it is none, or of another search space.
        """
        try:
            hidden_size = tensors["mlp.into_weight"].shape[1]
            # before anything is allocated: the file has as much as the sizes ask for
            if tensors["mlp.out_weight"].shape[:2] != (space.num_hidden_layers, hidden_size):
                raise IndexError
            router = cls(space, hidden_size=hidden_size)
            router.load_state_dict(dict(tensors))
        except (KeyError, IndexError, RuntimeError) as error:
            raise FlextronError(
                "the stored router is of another model or search space; train it again with route"
            ) from error
        return router.eval().requires_grad_(False)

    def forward(self, targets_B: Tensor) -> Choices:
        """Logits for targets, fractions of the full network's latency."""
        return Choices(self.mlp(targets_B), self.attention(targets_B), self.keep(targets_B) + self._bar_L2)

    def sample(self, choices: Choices) -> list[SubnetSpec]:
        """The likeliest choice of each layer and axis; of the layers to skip, no more than may be, the surest first."""
        mlp, attention = choices.mlp_BLW.argmax(-1).tolist(), choices.attention_BLG.argmax(-1).tolist()
        margin_BL = choices.keep_BL2[..., 1] - choices.keep_BL2[..., 0]
        specs = []
        for w, g, margins in zip(mlp, attention, margin_BL.tolist(), strict=True):
            wanted = [i for i in self.space.skippable_layers if margins[i] > 0]
            skipped = set(sorted(wanted, key=lambda i: -margins[i])[: self.space.max_skipped_layers])
            specs.append(
                SubnetSpec(
                    layers=tuple(
                        LayerSpec(intermediate_size=0, num_groups=0)
                        if i in skipped
                        else LayerSpec(
                            intermediate_size=self.space.intermediate_sizes[w[i]],
                            num_groups=self.space.num_groups[g[i]],
                        )
                        for i in range(self.space.num_hidden_layers)
                    )
                )
            )
        return specs

    def one_hot(self, specs: list[SubnetSpec]) -> Choices:
        """Sub-networks of the space as choices of probability 1; a skipped layer's widths count as the smallest."""
        sizes, groups = self.space.intermediate_sizes, self.space.num_groups
        device = self.mlp.out_bias.device
        mlp = [[sizes.index(x.intermediate_size) if x.intermediate_size else 0 for x in s.layers] for s in specs]
        attention = [[groups.index(x.num_groups) if x.num_groups else 0 for x in s.layers] for s in specs]
        skip = [[int(x.is_skipped) for x in s.layers] for s in specs]
        parts = ((mlp, len(sizes)), (attention, len(groups)), (skip, 2))
        return Choices(*(F.one_hot(torch.tensor(i, device=device), n).float() for i, n in parts))

    @torch.no_grad()
    def spec(self, target: float, table: LatencyTable) -> SubnetSpec:
        """The likeliest sub-network within a target, on the device of a table.

        The router's answer is held to the budget by a knapsack over log-probabilities.

        Args:
            target: fraction of the full network's latency.
            table: costs; also of another device than the router was trained for.

        Raises:
            FlextronError: the target is outside what the space reaches; names the range.
        """
        (spec,) = self.within(self(torch.tensor([target], device=self.mlp.out_bias.device)), [target], table)
        return spec

    @torch.no_grad()
    def within(self, logits: Choices, targets: Sequence[float], table: LatencyTable) -> list[SubnetSpec]:
        """For each target, the likeliest sub-network among those that cost about as much and no more.

        Args:
            logits: logits of as many targets; with noise, this draws.
            targets: fractions of the full network's latency.
            table: costs.

        Raises:
            FlextronError: a target is outside what the space reaches; names the range.
        """
        specs = []
        for row, target in enumerate(targets):
            check_reach(self.space, table, target)
            budget = target * table.predict_ms(self.space.full) - table.base_ms
            costs = self._negative_log_likelihoods(logits, row)
            specs.append(Allocator(self.space, costs, table.layer_ms).close_to(budget))
        return specs

    def _negative_log_likelihoods(self, logits: Choices, row: int) -> Sensitivity:
        """The logits of one target in the form of the allocator's loss terms."""
        mlp, attention, keep = (
            torch.log_softmax(part[row], -1).neg().tolist()
            for part in (logits.mlp_BLW, logits.attention_BLG, logits.keep_BL2)
        )
        sizes, groups = self.space.intermediate_sizes, self.space.num_groups
        return Sensitivity(
            mlp=tuple(
                {0: k[1]} | {w: k[0] + c for w, c in zip(sizes, m, strict=True)} for m, k in zip(mlp, keep, strict=True)
            ),
            attention=tuple({0: 0.0} | dict(zip(groups, a, strict=True)) for a in attention),
        )


def check_reach(space: SearchSpace, table: LatencyTable, target: float) -> None:
    """Raise unless some sub-network is within a fraction of the full network's latency.

    Raises:
        FlextronError: none is; names the reachable range.
    """
    least = table.predict(space.smallest)
    if not least * (1 - 1e-9) <= target <= 1:
        raise FlextronError(f"no sub-network reaches latency={target:g}; this model spans {least:.4g} to 1")


def straight_through(soft: Choices, hard: Choices) -> Choices:
    """The hard choices' values with the soft ones' gradients."""

    def through(s: Tensor, h: Tensor) -> Tensor:
        return h + s - s.detach()

    return Choices(
        through(soft.mlp_BLW, hard.mlp_BLW),
        through(soft.attention_BLG, hard.attention_BLG),
        through(soft.keep_BL2, hard.keep_BL2),
    )


def latency_ms(choices: Choices, table: LatencyTable) -> Tensor:
    """Expected milliseconds of relaxed choices, (B,), differentiable; of one-hot ones, the table's prediction."""
    device = choices.mlp_BLW.device
    mlp_W = torch.tensor([table.mlp_ms[w] for w in sorted(table.mlp_ms)], device=device)
    attention_G = torch.tensor([table.attention_ms[g] for g in sorted(table.attention_ms)], device=device)
    layers_BL = choices.mlp_BLW @ mlp_W + choices.attention_BLG @ attention_G
    return table.base_ms + (layers_BL * choices.keep_BL2[..., 0]).sum(-1)

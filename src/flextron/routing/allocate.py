"""Width for every layer under a budget: the cheapest expected loss, by an additive model (a knapsack).

The model's terms come from `Sensitivity`. The budget's unit is the caller's: milliseconds where a table was measured,
parameters where training must not depend on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from flextron.routing.sensitivity import Sensitivity
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

__all__ = ["Allocator"]

_SKIP = LayerSpec(intermediate_size=0, num_groups=0)
_BISECTIONS = 40


def _is_nested(a: LayerSpec, b: LayerSpec) -> bool:
    """Whether `b` has all that `a` has."""
    return a.intermediate_size <= b.intermediate_size and a.num_groups <= b.num_groups


@dataclass(frozen=True)
class Allocator:
    """Finds the best sub-network for a budget, according to the loss model."""

    space: SearchSpace
    sensitivity: Sensitivity
    layer_cost: Callable[[LayerSpec], float]
    """What one layer adds to the budget."""
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of narrowed MLPs, narrowed attention and skipped layers in the loss model."""

    @cached_property
    def _options(self) -> list[list[tuple[LayerSpec, float, float]]]:
        """All choices of each layer, with modelled loss and cost."""
        widths = [
            LayerSpec(intermediate_size=w, num_groups=g)
            for w in self.space.intermediate_sizes
            for g in self.space.num_groups
        ]
        skippable = self.space.skippable_layers if self.space.max_skipped_layers else ()
        return [
            [(o, self.loss(i, o), self.layer_cost(o)) for o in widths + [_SKIP] * (i in skippable)]
            for i in range(self.space.num_hidden_layers)
        ]

    def loss(self, i: int, layer: LayerSpec) -> float:
        """The loss model's term of layer `i`."""
        m = self.sensitivity.mlp[i][layer.intermediate_size]
        a = self.sensitivity.attention[i][layer.num_groups]
        w_mlp, w_attention, w_skip = self.weights
        return w_skip * (m + a) if layer.is_skipped else w_mlp * m + w_attention * a

    def _cheapest(self, price: float) -> tuple[SubnetSpec, float]:
        """The sub-network of least loss plus `price` times cost, and its cost."""
        chosen: dict[int, tuple[LayerSpec, float]] = {}
        regret: dict[int, tuple[float, LayerSpec, float]] = {}
        for i, options in enumerate(self._options):
            layer, loss, cost = min(options, key=lambda o: o[1] + price * o[2])
            chosen[i] = layer, cost
            if layer.is_skipped:
                kept = min((o for o in options if not o[0].is_skipped), key=lambda o: o[1] + price * o[2])
                regret[i] = kept[1] + price * kept[2] - loss - price * cost, kept[0], kept[2]
        # too many skipped: those stay whose return costs least
        surplus = max(0, len(regret) - self.space.max_skipped_layers)
        for i in sorted(regret, key=lambda i: regret[i][0])[:surplus]:
            chosen[i] = regret[i][1:]
        spec = SubnetSpec(layers=tuple(chosen[i][0] for i in sorted(chosen)))
        return spec, sum(cost for _, cost in chosen.values())

    def within(self, budget: float) -> SubnetSpec:
        """The modelled optimum whose layers cost at most `budget`; the smallest sub-network if nothing does."""
        unpriced, cost = self._cheapest(0.0)
        if cost <= budget:
            return unpriced
        best = self.space.smallest
        low, high = 1e-12, 1e12
        for _ in range(_BISECTIONS):
            price = (low * high) ** 0.5
            spec, cost = self._cheapest(price)
            if cost <= budget:
                best, high = spec, price
            else:
                low = price
        return self._filled(best, budget)

    def close_to(self, budget: float) -> SubnetSpec:
        """The same as `within`, but spends the budget even where the loss model sees no gain."""
        best, cost = self._cheapest(0.0)
        if cost > budget:
            return self._spent(self.within(budget), budget)
        low, high = 1e-12, 1e12
        for _ in range(_BISECTIONS):
            reward = (low * high) ** 0.5
            spec, cost = self._cheapest(-reward)
            if cost <= budget:
                best, low = spec, reward
            else:
                high = reward
        return self._spent(best, budget)

    def _filled(self, spec: SubnetSpec, budget: float) -> SubnetSpec:
        """Spend what the Lagrangian left over: widen single layers, the largest gain first, while the budget allows."""
        layers = list(spec.layers)
        room = budget - sum(self.layer_cost(layer) for layer in layers)
        while True:
            gains = [
                (self.loss(i, layers[i]) - loss, i, layer, cost - self.layer_cost(layers[i]))
                for i, options in enumerate(self._options)
                for layer, loss, cost in options
                if not layer.is_skipped and cost - self.layer_cost(layers[i]) <= room
            ]
            gain, i, layer, extra = max(gains, key=lambda g: g[0], default=(0.0, 0, layers[0], 0.0))
            if gain <= 0:
                return SubnetSpec(layers=tuple(layers))
            layers[i], room = layer, room - extra

    def _spent(self, spec: SubnetSpec, budget: float) -> SubnetSpec:
        """Widen single layers until none fits the budget, even at a loss: the most gain for the cost first."""
        layers = list(spec.layers)
        while True:
            costs = [self.layer_cost(layer) for layer in layers]
            room = budget - sum(costs)
            steps = [
                ((self.loss(i, layers[i]) - loss) / (cost - costs[i]), i, layer)
                for i, options in enumerate(self._options)
                for layer, loss, cost in options
                if 0 < cost - costs[i] <= room and _is_nested(layers[i], layer)
            ]
            if not steps:
                return SubnetSpec(layers=tuple(layers))
            _, i, layer = max(steps, key=lambda step: step[0])
            layers[i] = layer

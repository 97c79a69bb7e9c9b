"""What token-level routing costs and loses on real text, and the prices at which its average cost meets a target.

Costs are those of decode steps by the latency table: of single sequences that is the mean time of a token. Where
sequences share a step, so does its weight traffic, and the table's batch size says for how many that holds.

Shapes: N tokens, B sequences of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.batch import Batch, TokenChoice
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.routing.latency import LatencyTable
from flextron.routing.token_router import TokenRouter
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SubnetSpec

__all__ = ["RoutedCost", "RoutedScore", "calibrate", "routed_cost", "score_routed"]

_CHUNK_SEQUENCES = 16
_TOLERANCE, _BISECTIONS = 0.002, 30


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedCost:
    """Decode time of a token-routed model, over tokens."""

    mean_ms: float
    """Average milliseconds of a step."""
    fraction: float
    """The same, over the full network's."""
    std: float
    """Standard deviation over tokens, as a fraction of the full network's."""
    low: float
    """5th percentile over tokens, as a fraction of the full network's."""
    high: float
    """95th percentile over tokens, as a fraction of the full network's."""
    mean_width: tuple[float, ...]
    """Average MLP width of each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedScore:
    """Loss and cost of a token-routed model on the same text."""

    loss: float
    """Mean negative log-likelihood, in nats."""
    cost: RoutedCost


@dataclass(slots=True)
class _Recorder:
    """Hands a router's choices through and keeps them."""

    router: TokenChoice
    widths: dict[int, list[Tensor]] = field(default_factory=dict)
    """Widths by layer, in the order in which the tokens came."""

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        widths_N, gates_N = self.router(layer, x_ND)
        self.widths.setdefault(layer, []).append(widths_N)
        return widths_N, gates_N

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        self.router.check(config, spec)

    def cost(self, table: LatencyTable, spec: SubnetSpec) -> RoutedCost:
        sizes = (0, *sorted(table.mlp_ms))
        ms_C = torch.tensor([0.0, *(table.mlp_ms[w] for w in sizes[1:])], dtype=torch.float64)
        total = torch.tensor(table.predict_ms(spec), dtype=torch.float64)
        mean_width = [float(w) for w in spec.intermediate_sizes]
        for i, pieces in self.widths.items():
            widths_N = torch.cat(pieces).cpu()
            mean_width[i] = float(widths_N.double().mean())
            spent = ms_C[torch.searchsorted(torch.tensor(sizes), widths_N)]
            total = total + spent - table.mlp_ms[spec.layers[i].intermediate_size]
        full_ms = table.predict_ms(spec) / table.predict(spec)
        fractions = total.reshape(-1) / full_ms
        low, high = torch.quantile(fractions, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        return RoutedCost(
            mean_ms=float(total.mean()),
            fraction=float(fractions.mean()),
            std=float(fractions.std(correction=0)),
            low=low,
            high=high,
            mean_width=tuple(mean_width),
        )


@torch.no_grad()
def routed_cost(
    decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec, router: TokenChoice, table: LatencyTable
) -> RoutedCost:
    """Average decode time on sequences of tokens, without their loss; arguments as for `score_routed`."""
    router.check(decoder.config, spec)
    recorder = _Recorder(router)
    for chunk in tokens_BT.to(decoder.device).split(_CHUNK_SEQUENCES):
        decoder(Batch.padded(chunk, spec, recorder))
    return recorder.cost(table, spec)


def score_routed(
    decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec, router: TokenChoice, table: LatencyTable
) -> RoutedScore:
    """Mean loss and decode time of a token-routed model.

    Args:
        decoder: the full model.
        tokens_BT: sequences of tokens.
        spec: sub-network around which tokens are routed.
        router: chooses the tokens' widths, from `TokenRouter.at`.
        table: costs, which may be another device's than the router's.

    Raises:
        FlextronError: the sequences exceed the model's positions, or the router is of another model.
    """
    recorder = _Recorder(router)
    loss = mean_loss(decoder, tokens_BT, spec, recorder)
    return RoutedScore(loss=loss, cost=recorder.cost(table, spec))


def calibrate(
    router: TokenRouter,
    decoder: Decoder,
    tokens_BT: Tensor,
    static_specs: Mapping[float, SubnetSpec],
    table: LatencyTable,
) -> dict[float, float]:
    """Set the router's prices so that on this text the average cost is each static sub-network's.

    A bisection over whole passes, for hidden states depend on earlier choices.

    Args:
        router: its `prices` are replaced.
        decoder: the full model.
        tokens_BT: sequences of real text; some thousand tokens.
        static_specs: by target, the sub-network around which tokens are routed, whose cost they meet on average.
        table: costs.

    Returns:
        The average cost over the static sub-network's, by target: 1 where calibration succeeded.

    Raises:
        FlextronError: there is no target, one is not in (0, 1], or the router is of another model.
    """
    if not static_specs:
        raise FlextronError("calibration needs at least one target with its static sub-network")
    prices, reached = {}, {}
    for target, spec in static_specs.items():
        prices[target], reached[target] = _bisect(router, decoder, tokens_BT, target, spec, table)
    router.prices = prices
    return reached


def _bisect(
    router: TokenRouter, decoder: Decoder, tokens_BT: Tensor, target: float, spec: SubnetSpec, table: LatencyTable
) -> tuple[float, float]:
    """The price whose average cost comes closest to the static one's, and the ratio of the two."""
    wanted = table.predict(spec)

    def ratio(price: float) -> float:
        return routed_cost(decoder, tokens_BT, spec, router.at(target, price), table).fraction / wanted

    low, high = 0.0, 1.0
    tried = {0.0: ratio(0.0)}
    while (found := ratio(high)) > 1 and high < 1e12:
        tried[high] = found
        low, high = high, high * 8
    tried[high] = found
    for _ in range(_BISECTIONS):
        best = min(tried, key=lambda price: abs(tried[price] - 1))
        if abs(tried[best] - 1) <= _TOLERANCE:
            break
        # prices span orders of magnitude, but reach down to 0
        middle = (low * high) ** 0.5 if low > high * 1e-6 else high / 8
        tried[middle] = ratio(middle)
        low, high = (middle, high) if tried[middle] > 1 else (low, middle)
    best = min(tried, key=lambda price: abs(tried[price] - 1))
    return best, tried[best]

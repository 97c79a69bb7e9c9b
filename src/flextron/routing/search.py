"""Search for the sub-networks that lose least at each latency, by measured loss.

A model of the loss, additive over half layers, proposes; measurements decide and correct it. Its terms come from
`Sensitivity`; how much narrowed MLPs, narrowed attention and skipped layers count against each other is refitted after
every round to all losses measured so far. Proposals are the model's optimum for each target (a knapsack, solved by its
Lagrangian, see `Allocator`). The best one at each target is then refined: sensitivities are measured around it, and the
optimum of that model, with a price on every half layer that changes, is measured at several prices. Uniform ones are
measured beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flextron.model.cost import kv_bytes_per_token, num_parameters
from flextron.model.decoder import Decoder
from flextron.progress import OnProgress
from flextron.routing.allocate import Allocator
from flextron.routing.frontier import Frontier, FrontierPoint
from flextron.routing.latency import LatencyTable
from flextron.routing.refine import CALIBRATION_SEQUENCES, PRICES_OF_CHANGE, proposals_around
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SearchSpace, SubnetSpec

__all__ = ["SearchSettings", "measure_point", "search_frontier", "uniform_specs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How long and where to search."""

    targets: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
    """Latency fractions around which to look."""
    rounds: int = 2
    """Proposals from the fitted model, one a target and round."""
    refinements: int = 1
    """Refinements of the best sub-network of each target, after the rounds; each measures up to four others."""
    num_uniform: int = 6
    """Uniform sub-networks measured for comparison."""
    seed: int = 0
    """Seed of the sensitivities' draws."""


def measure_point(
    decoder: Decoder, table: LatencyTable, validation_BT: Tensor, spec: SubnetSpec, kind: str
) -> FrontierPoint:
    """Count a sub-network's parameters and bytes, look up its latency and measure its loss."""
    params, size = num_parameters(decoder.config, spec), decoder.dtype.itemsize
    return FrontierPoint(
        spec=spec,
        kind=kind,
        params=params,
        mem_bytes=params * size,
        kv_bytes_per_token=kv_bytes_per_token(decoder.config, spec, size),
        latency_ms=table.predict_ms(spec),
        latency=table.predict(spec),
        loss=mean_loss(decoder, validation_BT, spec),
    )


@dataclass(slots=True)
class _Search:
    decoder: Decoder
    space: SearchSpace
    table: LatencyTable
    sensitivity: Sensitivity
    calibration_BT: Tensor
    validation_BT: Tensor
    budget: int
    on_progress: OnProgress | None
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    found: dict[SubnetSpec, FrontierPoint] = field(default_factory=dict)

    def measure(self, spec: SubnetSpec, kind: str) -> None:
        """Measure a sub-network once."""
        if spec not in self.found:
            self.found[spec] = measure_point(self.decoder, self.table, self.validation_BT, spec, kind)
        if self.on_progress is not None:
            self.on_progress(min(len(self.found), self.budget - 1), self.budget)

    def propose(self, target: float) -> SubnetSpec:
        """The optimum within a latency fraction, as the refitted model of the full network's neighbourhood has it."""
        return self.optimum(target, self.sensitivity, self.weights)

    def optimum(
        self, target: float, sensitivity: Sensitivity, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> SubnetSpec:
        """The modelled optimum within a latency fraction."""
        allocator = Allocator(self.space, sensitivity, self.table.layer_ms, weights)
        return allocator.within(target * self.table.predict_ms(self.space.full) - self.table.base_ms)

    def refit(self) -> None:
        """Fit the weights of the model's three terms to the measured rises of the loss."""
        full = self.found[self.space.full].loss
        rows = [self.sensitivity.terms(spec) for spec in self.found]
        a = torch.tensor(rows, dtype=torch.float64)
        y = torch.tensor([p.loss - full for p in self.found.values()], dtype=torch.float64).clamp_min(0)
        scale = a.mean(0).clamp_min(1e-12)
        # a little of the prior (equal weights) keeps terms that were hardly tried from vanishing
        prior = y.mean() / (a / scale).sum(1).mean().clamp_min(1e-12)
        ridge = 0.1 * len(y) ** 0.5
        left = torch.cat([a / scale, ridge * torch.eye(3, dtype=torch.float64)])
        right = torch.cat([y, ridge * prior.expand(3)])
        solution = torch.linalg.lstsq(left, right[:, None]).solution[:, 0].clamp_min(float(prior) * 0.05)
        mlp, attention, skip = (solution / scale).tolist()
        self.weights = mlp, attention, skip

    def refine(self, target: float) -> bool:
        """Measure changes of the best sub-network at a target; whether one of them is better."""
        within = [p for p in self.found.values() if p.latency <= target]
        if not within:
            return False
        best = min(within, key=lambda p: p.loss)
        optimum = partial(self.optimum, target)
        for spec in proposals_around(self.decoder, self.space, best.spec, self.calibration_BT, optimum):
            self.measure(spec, "refined")
        return min(p.loss for p in self.found.values() if p.latency <= target) < best.loss


def uniform_specs(space: SearchSpace, count: int) -> list[SubnetSpec]:
    """Uniform sub-networks along the diagonal of the space, full and smallest included."""
    sizes = space.intermediate_sizes
    picks = sorted({round(j * (len(sizes) - 1) / max(1, count - 1)) for j in range(count)}, reverse=True)
    groups = space.num_groups
    return [space.uniform(sizes[k], groups[round(k * (len(groups) - 1) / max(1, len(sizes) - 1))]) for k in picks]


def search_frontier(
    decoder: Decoder,
    space: SearchSpace,
    table: LatencyTable,
    *,
    calibration_BT: Tensor,
    validation_BT: Tensor,
    text: str,
    settings: SearchSettings | None = None,
    candidates: Sequence[SubnetSpec] = (),
    on_progress: OnProgress | None = None,
) -> Frontier:
    """Measure a frontier of loss over latency.

    Args:
        decoder: the full model.
        space: its sub-networks.
        table: latencies on this device.
        calibration_BT: sequences for the sensitivities, two at a time: two are enough around the full network, its
            sub-networks want as many as the validation has.
        validation_BT: sequences on which losses are measured.
        text: name of the validation text, for the record.
        settings: targets and effort.
        candidates: sub-networks to measure before the search, such as those that were trained.
        on_progress: called with sub-networks measured and to be measured.
    """
    settings = settings or SearchSettings()
    per_round = len(settings.targets)
    budget = (
        settings.num_uniform
        + 2
        + len(candidates)
        + per_round * (settings.rounds + settings.refinements * len(PRICES_OF_CHANGE))
    )
    sensitivity = measure_sensitivity(decoder, calibration_BT[:CALIBRATION_SEQUENCES], space, seed=settings.seed)
    search = _Search(decoder, space, table, sensitivity, calibration_BT, validation_BT, budget, on_progress)
    for spec in [space.full, *uniform_specs(space, settings.num_uniform)]:
        search.measure(spec, "uniform")
    for spec in (space.smallest, *candidates):
        search.measure(spec, "guided")
    for _ in range(settings.rounds):
        for target in settings.targets:
            search.measure(search.propose(target), "guided")
        search.refit()
    for target in settings.targets:
        for _ in range(settings.refinements):
            if not search.refine(target):
                break
    if on_progress is not None:
        on_progress(budget, budget)
    return Frontier.of(table.device, text, search.found.values())

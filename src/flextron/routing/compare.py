"""The router's sub-networks beside those that others would take at the same latency, all measured alike.

`uniform`: the same widths in every layer. `mix'n'match`: MatFormer's way of reaching sizes between those it was trained
on, two neighbouring MLP widths, the larger one in the last layers, all attention kept. `random`: any sub-network of the
space that costs about the target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from flextron.model.decoder import Decoder
from flextron.progress import OnProgress
from flextron.routing.frontier import FrontierPoint
from flextron.routing.latency import LatencyTable
from flextron.routing.routers import StaticRouter
from flextron.routing.search import measure_point
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

__all__ = ["compare_frontiers", "mix_n_match", "random_within", "uniform_within"]

_TRIES = 400
_CLOSE = 0.03
"""A random sub-network counts as costing about the target if it needs no less than this fraction under it."""


def uniform_within(space: SearchSpace, table: LatencyTable, target: float) -> list[SubnetSpec]:
    """The widest uniform sub-network within a latency fraction, for each number of groups."""
    found = []
    for groups in space.num_groups:
        within = [s for w in space.intermediate_sizes if table.predict(s := space.uniform(w, groups)) <= target]
        found += within[-1:]
    return found


def mix_n_match(space: SearchSpace, table: LatencyTable, target: float) -> SubnetSpec | None:
    """The largest mixture of two neighbouring MLP widths within a latency fraction; None if the smallest is not."""
    sizes, groups, layers = space.intermediate_sizes, space.num_groups[-1], space.num_hidden_layers
    best = None
    for small, large in zip(sizes, sizes[1:] + sizes[-1:], strict=True):
        for num_large in range(layers + 1):
            widths = [small] * (layers - num_large) + [large] * num_large
            spec = SubnetSpec(layers=tuple(LayerSpec(intermediate_size=w, num_groups=groups) for w in widths))
            if table.predict(spec) <= target:
                best = spec
    return best


def random_within(space: SearchSpace, table: LatencyTable, target: float, rng: random.Random) -> SubnetSpec | None:
    """A random sub-network that costs about the target; None if none was drawn."""
    for _ in range(_TRIES):
        spec = space.heterogeneous(rng.random(), rng)
        if target - _CLOSE <= table.predict(spec) <= target:
            return spec
    return None


def compare_frontiers(
    decoder: Decoder,
    space: SearchSpace,
    table: LatencyTable,
    validation_BT: Tensor,
    targets: Sequence[float],
    *,
    router: StaticRouter | None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[FrontierPoint]:
    """Measure each kind of sub-network at each target that it reaches.

    Args:
        decoder: the full model.
        space: its sub-networks.
        table: latencies on this device.
        validation_BT: sequences on which losses are measured.
        targets: latency fractions.
        router: None leaves its kind out.
        seed: seed of the random sub-networks.
        on_progress: called with sub-networks measured and to be measured.
    """
    rng = random.Random(seed)
    wanted: dict[SubnetSpec, str] = {space.full: "uniform"}
    for target in targets:
        if router is not None and target >= table.predict(space.smallest):
            wanted.setdefault(router.spec(target, table), "router")
        for spec in uniform_within(space, table, target):
            wanted.setdefault(spec, "uniform")
        for kind, found in (
            ("mix'n'match", mix_n_match(space, table, target)),
            ("random", random_within(space, table, target, rng)),
        ):
            if found is not None:
                wanted.setdefault(found, kind)
    points = []
    for i, (spec, kind) in enumerate(wanted.items()):
        points.append(measure_point(decoder, table, validation_BT, spec, kind))
        if on_progress is not None:
            on_progress(i + 1, len(wanted))
    return points

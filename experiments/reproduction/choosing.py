"""Which sub-network stands for a size, found on the search windows: by router for Flextron, by search for others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from flextron.model.cost import block_parameters, layer_parameters
from flextron.model.decoder import Decoder
from flextron.routing.allocate import Allocator
from flextron.routing.compare import mix_n_match
from flextron.routing.latency import LatencyTable
from flextron.routing.routers import StaticRouter
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec
from flextron.training.routers import RouterRecipe, train_static_router
from flextron.training.sampling import uniform_subnet

__all__ = ["better_router", "choose", "choose_mixed", "choose_uniform", "routed_specs", "search_specs", "train_router"]

_SENSITIVITY_WINDOWS = 8


def train_router(
    decoder: Decoder, space: SearchSpace, search_BT: Tensor, *, seed: int, effort: int
) -> tuple[StaticRouter, dict[str, float]]:
    """A static router by surrogate, on a part of the search windows, with parameters in place of a device's time.

    Returns:
        The router, and how good its surrogate was. No token of the training text is used.
    """
    table = LatencyTable.of_parameters(decoder.config, space)
    windows_BT = search_BT[: max(1, len(search_BT) // 2)]
    result = train_static_router(
        decoder, space, table, windows_BT, RouterRecipe(num_measured=12 * effort, seed=seed, min_target=0.3)
    )
    return result.router, {"spearman": result.spearman, "surrogate_error": result.error}


def routed_specs(decoder: Decoder, router: StaticRouter, budgets: Mapping[float, int]) -> dict[float, SubnetSpec]:
    """What a router answers to each size's budget of block parameters."""
    table = LatencyTable.of_parameters(decoder.config, router.space)
    return {size: router.spec(budget / table.full_ms, table) for size, budget in budgets.items()}


def better_router(
    decoder: Decoder, routers: Sequence[StaticRouter], search_BT: Tensor, budgets: Mapping[float, int]
) -> StaticRouter:
    """The router whose answers have the lower mean loss on the search windows that none was trained on."""
    windows_BT = search_BT[max(1, len(search_BT) // 2) :] if len(search_BT) > 1 else search_BT

    def loss(router: StaticRouter) -> float:
        return sum(mean_loss(decoder, windows_BT, spec) for spec in routed_specs(decoder, router, budgets).values())

    return min(routers, key=loss)


def search_specs(
    decoder: Decoder, space: SearchSpace, search_BT: Tensor, budgets: Mapping[float, int], *, seed: int, effort: int
) -> dict[float, SubnetSpec]:
    """The sub-network of each size by search, for methods that have no routers."""
    return {
        size: choose(decoder, space, search_BT, budget, seed=seed, effort=effort) for size, budget in budgets.items()
    }


def choose(
    decoder: Decoder, space: SearchSpace, search_BT: Tensor, budget: int, *, seed: int, effort: int
) -> SubnetSpec:
    """The sub-network of least measured loss among `effort` that hold at most `budget` block parameters.

    Candidates are the uniform one, optima of the additive loss model under several weights of its terms, and
    mutations of the best so far.
    """
    rng = random.Random(seed)
    config = decoder.config
    sensitivity = measure_sensitivity(decoder, search_BT[:_SENSITIVITY_WINDOWS], space, seed=seed)
    full = block_parameters(config, space.full)
    losses: dict[SubnetSpec, float] = {}

    def measure(spec: SubnetSpec) -> None:
        if spec not in losses and block_parameters(config, spec) <= budget:
            losses[spec] = mean_loss(decoder, search_BT, spec)

    measure(uniform_subnet(config, space, budget / full))
    for attempt in range(10 * effort):
        if len(losses) >= effort:
            break
        if attempt <= effort // 2:
            measure(_proposal(decoder, space, sensitivity, budget, rng, first=attempt == 0))
        else:
            measure(_mutation(min(losses, key=losses.__getitem__), space, rng))
    return min(losses, key=losses.__getitem__, default=space.smallest)


def choose_uniform(decoder: Decoder, space: SearchSpace, budgets: Mapping[float, int]) -> dict[float, SubnetSpec]:
    """The largest sub-network of equal layers within each budget."""
    full = block_parameters(decoder.config, space.full)
    return {size: uniform_subnet(decoder.config, space, budget / full) for size, budget in budgets.items()}


def choose_mixed(decoder: Decoder, space: SearchSpace, budgets: Mapping[float, int]) -> dict[float, SubnetSpec]:
    """MatFormer's mix'n'match: the largest mixture of two neighbouring MLP widths within each budget."""
    table = LatencyTable.of_parameters(decoder.config, space)
    found = {size: mix_n_match(space, table, budget / table.full_ms) for size, budget in budgets.items()}
    return {size: space.smallest if spec is None else spec for size, spec in found.items()}


def _proposal(
    decoder: Decoder, space: SearchSpace, sensitivity: Sensitivity, budget: int, rng: random.Random, *, first: bool
) -> SubnetSpec:
    """The loss model's optimum, with weights of MLP, attention and skipped layers near equal ones."""

    def cost(layer: LayerSpec) -> float:
        return float(layer_parameters(decoder.config, layer))

    spread = 0.0 if first else 0.7
    weights = (rng.lognormvariate(0, spread), rng.lognormvariate(0, spread), rng.lognormvariate(0, 2 * spread))
    return Allocator(space, sensitivity, cost, weights).within(float(budget))


def _mutation(parent: SubnetSpec, space: SearchSpace, rng: random.Random) -> SubnetSpec:
    """Widths of two kept layers moved, one up and one down, by a choice or two on one axis."""
    layers = list(parent.layers)
    kept = list(parent.kept_layers)
    if len(kept) < 2:
        return parent
    up, down = rng.sample(kept, 2)
    for i, direction in ((up, 1), (down, -1)):
        neurons, groups = layers[i].intermediate_size, layers[i].num_groups
        if rng.random() < 0.7:
            neurons = _moved(neurons, direction * rng.choice((1, 2, 3)), space.intermediate_sizes)
        else:
            groups = _moved(groups, direction, space.num_groups)
        layers[i] = LayerSpec(intermediate_size=neurons, num_groups=groups)
    return SubnetSpec(layers=tuple(layers))


def _moved(width: int, by: int, choices: tuple[int, ...]) -> int:
    return choices[min(max(choices.index(width) + by, 0), len(choices) - 1)]

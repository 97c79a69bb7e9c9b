"""The allocator against every sub-network of small spaces: optimal on the convex hull, never over budget."""

from __future__ import annotations

import dataclasses
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.routing.allocate import Allocator
from flextron.routing.sensitivity import Sensitivity
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

WIDTHS, GROUPS = (3, 5, 9), (1, 2)
SLACK = 1e-9


def layer_cost(layer: LayerSpec) -> float:
    """Dearer than linear at the wide end, so that no two sums are equal by chance."""
    return float(1.01 * layer.intermediate_size**1.1 + 2.3 * layer.num_groups**1.2)


def space_of(num_layers: int, skippable: tuple[int, ...], max_skipped: int) -> SearchSpace:
    return SearchSpace(
        num_hidden_layers=num_layers,
        intermediate_sizes=WIDTHS,
        num_groups=GROUPS,
        skippable_layers=skippable,
        max_skipped_layers=max_skipped,
    )


def sensitivity_of(num_layers: int, rng: random.Random) -> Sensitivity:
    """Costs that fall with the width, by steps of any size."""

    def table(widths: tuple[int, ...]) -> dict[int, float]:
        steps = [rng.uniform(0.01, 1) for _ in widths]
        return {w: sum(steps[k:]) for k, w in enumerate((0, *widths))}

    return Sensitivity(
        mlp=tuple(table(WIDTHS) for _ in range(num_layers)),
        attention=tuple(table(GROUPS) for _ in range(num_layers)),
    )


def members(space: SearchSpace) -> list[SubnetSpec]:
    """All sub-networks of the space, by definition."""
    skip = LayerSpec(intermediate_size=0, num_groups=0)
    kept = [LayerSpec(intermediate_size=w, num_groups=g) for w in WIDTHS for g in GROUPS]
    every = (SubnetSpec(layers=layers) for layers in product([skip, *kept], repeat=space.num_hidden_layers))
    return [spec for spec in every if spec in space]


def cost_of(spec: SubnetSpec) -> float:
    return sum(map(layer_cost, spec.layers))


def loss_of(sensitivity: Sensitivity, weights: tuple[float, float, float], spec: SubnetSpec) -> float:
    """The additive model, from its definition."""
    return sum(w * term for w, term in zip(weights, sensitivity.terms(spec), strict=True))


def hull(points: dict[SubnetSpec, tuple[float, float]]) -> list[tuple[float, float]]:
    """(Cost, loss) of the lower convex hull's corners, from the cheapest point to the one of least loss."""
    corners: list[tuple[float, float]] = []
    for cost, loss in sorted(points.values()):
        if corners and loss >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (c0, l0), (c1, l1) = corners[-2:]
            # the middle one is no corner if it lies on or above the line from its neighbours
            if (l1 - l0) * (cost - c0) < (loss - l0) * (c1 - c0):
                break
            corners.pop()
        corners.append((cost, loss))
    return corners


@st.composite
def problems(draw: st.DrawFn) -> tuple[Allocator, dict[SubnetSpec, tuple[float, float]]]:
    num_layers = draw(st.integers(1, 3))
    skippable = tuple(draw(st.permutations(range(num_layers))))[: draw(st.integers(0, num_layers))]
    space = space_of(num_layers, skippable, draw(st.integers(0, min(len(skippable), num_layers - 1))))
    weights = draw(st.tuples(*[st.sampled_from([0.3, 1.0, 4.0])] * 3))
    sensitivity = sensitivity_of(num_layers, random.Random(draw(st.integers(0, 10_000))))
    points = {spec: (cost_of(spec), loss_of(sensitivity, weights, spec)) for spec in members(space)}
    return Allocator(space, sensitivity, layer_cost, weights), points


@given(problems())
def test_budgets_on_the_hull_are_met_optimally(
    problem: tuple[Allocator, dict[SubnetSpec, tuple[float, float]]],
) -> None:
    allocator, points = problem
    for cost, loss in hull(points):
        found = allocator.within(cost * (1 + SLACK))
        assert points[found][1] == pytest.approx(loss)
        assert points[found][0] <= cost * (1 + SLACK)


@given(problems(), st.floats(0, 1.2))
def test_no_budget_is_exceeded(
    problem: tuple[Allocator, dict[SubnetSpec, tuple[float, float]]], fraction: float
) -> None:
    allocator, points = problem
    budget = fraction * cost_of(allocator.space.full)
    found = allocator.within(budget)
    # `points` holds the members of the space: the right layers are skipped, and not too many
    cost, loss = points[found]
    if budget < min(c for c, _ in points.values()):
        assert found == allocator.space.smallest
    else:
        assert cost <= budget or found == allocator.space.smallest
    # at most one step of the hull away from the best
    corners = [corner for corner in hull(points) if corner[0] <= budget]
    if corners:
        assert loss <= corners[-1][1] + 1e-9


@given(problems(), st.floats(0, 1.2), st.booleans())
def test_a_budget_is_spent_until_nothing_wider_fits(
    problem: tuple[Allocator, dict[SubnetSpec, tuple[float, float]]], fraction: float, indifferent: bool
) -> None:
    allocator, points = problem
    if indifferent:  # the narrowest is as good as anything, or better
        falling = {0: 0.0, 3: 1.0, 5: 2.0, 9: 3.0, 1: 1.0, 2: 2.0}
        layers = allocator.space.num_hidden_layers
        allocator = dataclasses.replace(
            allocator, sensitivity=Sensitivity(mlp=(falling,) * layers, attention=(falling,) * layers)
        )
    budget = fraction * cost_of(allocator.space.full)
    found = allocator.close_to(budget)
    assert found in points
    if points[found][0] > budget + SLACK:
        assert found == allocator.space.smallest
        return
    wider = [cost for spec, (cost, _) in points.items() if found.is_nested_in(spec) and spec != found]
    assert all(cost > budget - SLACK for cost in wider)


def test_a_budget_for_everything_gives_everything() -> None:
    space = space_of(3, (1,), 1)
    allocator = Allocator(space, sensitivity_of(3, random.Random(0)), layer_cost)
    assert allocator.within(cost_of(space.full)) == space.full
    assert allocator.within(1e9) == space.full


def test_nothing_within_an_impossible_budget_is_the_smallest() -> None:
    space = space_of(3, (2, 0), 1)
    allocator = Allocator(space, sensitivity_of(3, random.Random(0)), layer_cost)
    assert allocator.within(0.0) == space.smallest
    assert space.smallest.kept_layers == (0, 1)


@pytest.mark.parametrize("scales", [(1.0, 2.0, 3.0), (2.0, 3.0, 1.0), (3.0, 1.0, 2.0)])
def test_of_the_layers_that_may_be_skipped_the_cheapest_goes(scales: tuple[float, ...]) -> None:
    # narrowing a layer costs nearly as much as skipping it
    sensitivity = Sensitivity(
        mlp=tuple({0: s, 3: 0.99 * s, 5: 0.98 * s, 9: 0.0} for s in scales),
        attention=tuple({0: s, 1: 0.99 * s, 2: 0.0} for s in scales),
    )
    kept = [s > 1 for s in scales]
    expected = SubnetSpec.of([9 * k for k in kept], [2 * k for k in kept])
    assert Allocator(space_of(3, (0, 1, 2), 1), sensitivity, layer_cost).within(cost_of(expected)) == expected

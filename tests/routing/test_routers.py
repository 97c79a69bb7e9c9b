"""The static router: what it samples lies in the space, what it answers meets the budget, gradients reach it."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.routing import LatencyTable
from flextron.routing.routers import StaticRouter, latency_ms, straight_through
from flextron.routing.surrogate import spearman
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

SPACE = SearchSpace(
    num_hidden_layers=4,
    intermediate_sizes=(8, 24, 40),
    num_groups=(1, 2),
    skippable_layers=(1, 2),
    max_skipped_layers=1,
)
TABLE = LatencyTable(
    device="a-quiet-machine",
    batch_size=1,
    context=8,
    base_ms=1.0,
    mlp_ms={8: 0.5, 24: 1.1, 40: 1.9},
    attention_ms={1: 0.4, 2: 0.7},
    full_ms=11.4,
    median_error=0.0,
    max_error=0.0,
)


def random_router(seed: int, sharpness: float = 20.0) -> StaticRouter:
    torch.manual_seed(seed)
    router = StaticRouter(SPACE).requires_grad_(False)
    for bank in (router.mlp, router.attention, router.keep):
        bank.out_weight.mul_(sharpness)
    return router


def all_specs() -> list[SubnetSpec]:
    layers = [*itertools.product(SPACE.intermediate_sizes, SPACE.num_groups), (0, 0)]
    every = (SubnetSpec.of(*zip(*choice, strict=True)) for choice in itertools.product(layers, repeat=4))
    return [spec for spec in every if spec in SPACE]


SPECS = all_specs()
LATENCIES = {spec: TABLE.predict(spec) for spec in SPECS}
LEAST = TABLE.predict(SPACE.smallest)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(LEAST, 1.0))
def test_the_answer_is_in_the_space_and_within_the_target(seed: int, target: float) -> None:
    spec = random_router(seed).spec(target, TABLE)
    assert spec in SPACE
    assert TABLE.predict(spec) <= target * (1 + 1e-9)


def log_likelihoods(router: StaticRouter, specs: Iterable[SubnetSpec], target: float) -> list[float]:
    """What the router's distributions give each sub-network."""
    logits = router(torch.tensor([target]))
    keep, mlp, attention = (
        torch.log_softmax(scores[0], -1).tolist() for scores in (logits.keep_BL2, logits.mlp_BLW, logits.attention_BLG)
    )

    def of_layer(i: int, layer: LayerSpec) -> float:
        if layer.is_skipped:
            return float(keep[i][1])
        width = mlp[i][SPACE.intermediate_sizes.index(layer.intermediate_size)]
        return float(keep[i][0] + width + attention[i][SPACE.num_groups.index(layer.num_groups)])

    return [sum(of_layer(i, layer) for i, layer in enumerate(spec.layers)) for spec in specs]


@functools.cache
def maximal(target: float) -> list[SubnetSpec]:
    """The sub-networks within a target that are part of no wider one within it."""
    within = [spec for spec in SPECS if LATENCIES[spec] <= target]
    return [spec for spec in within if not any(spec != s and spec.is_nested_in(s) for s in within)]


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_spends_the_target_on_likely_widths(seed: int) -> None:
    router = random_router(seed)
    for target in (0.5, 0.7, 0.9):
        spec = router.spec(target, TABLE)
        assert spec in maximal(target)
        (own,) = log_likelihoods(router, [spec], target)
        rivals = log_likelihoods(router, maximal(target), target)
        assert sum(rival > own for rival in rivals) <= len(rivals) / 4


def test_the_whole_budget_gives_the_full_network() -> None:
    assert random_router(2).spec(1.0, TABLE) == SPACE.full


def test_a_target_out_of_reach_names_the_range() -> None:
    with pytest.raises(FlextronError, match=rf"latency=0.01; this model spans {LEAST:.4g} to 1"):
        random_router(0).spec(0.01, TABLE)


def test_samples_follow_the_logits_and_skip_no_more_than_may_be() -> None:
    router = random_router(1)
    logits = router(torch.linspace(LEAST, 1, 16))
    noisy = logits.relaxed(0.5, 1.0, logits.gumbel(torch.Generator().manual_seed(0)))
    specs = router.sample(noisy)
    assert all(spec in SPACE for spec in specs)
    assert len(set(specs)) > 4
    for j, spec in enumerate(specs):
        for i, layer in enumerate(spec.layers):
            if not layer.is_skipped:
                assert layer.intermediate_size == SPACE.intermediate_sizes[int(noisy.mlp_BLW[j, i].argmax())]


def test_latency_of_one_hot_choices_is_the_tables() -> None:
    specs = random.Random(0).sample(SPECS, 50)
    milliseconds = latency_ms(random_router(0).one_hot(specs), TABLE)
    assert milliseconds.tolist() == pytest.approx([TABLE.predict_ms(spec) for spec in specs], rel=1e-6)


def test_straight_through_has_hard_values_and_soft_gradients() -> None:
    torch.manual_seed(0)
    router = StaticRouter(SPACE)
    soft = router(torch.tensor([0.5, 0.9])).relaxed(1.0, 1.0, None)
    hard = router.one_hot(router.sample(soft))
    through = straight_through(soft, hard)
    assert torch.allclose(through.mlp_BLW, hard.mlp_BLW)
    weights = torch.randn_like(soft.mlp_BLW)
    ours, reference = (
        torch.autograd.grad((c.mlp_BLW * weights).sum(), router.mlp.out_bias, retain_graph=True)[0]
        for c in (through, soft)
    )
    assert torch.allclose(ours, reference)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 4], [1, 3, 2, 4], 3 / math.sqrt(10)),
    ],
)
def test_spearman_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)

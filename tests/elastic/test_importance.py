"""Ranking against brute force: what hooks see in Hugging Face's model, and units removed one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from flextron.elastic.importance import rank, removal_order
from tests.checkpoints.families_cases import (
    decoder_of,
    hf_logits,
    random_decoder_of,
    random_model,
    random_tokens,
)

CASES = ["llama", "llama-3", "llama-mqa", "qwen3", "gpt2", "neox"]
TOKENS = random_tokens(6, 16)  # more sequences than are run at once
OUTPUTS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


@dataclass
class Seen:
    """What one layer's hooks saw."""

    heads: Tensor = field(default_factory=lambda: torch.empty(0))
    """Input of the attention's output projection, (N, rows), float64."""
    neurons: Tensor = field(default_factory=lambda: torch.empty(0))
    """Input of the MLP's output projection, (N, F), float64."""
    attention_weight: Tensor = field(default_factory=lambda: torch.empty(0))
    """By input: (rows, D)."""
    mlp_weight: Tensor = field(default_factory=lambda: torch.empty(0))
    """By input: (F, D)."""
    cosine: float = 0.0
    """Mean similarity of the layer's input and output."""


def observe(model: PreTrainedModel) -> list[Seen]:
    """Run the model once, hooks on every layer."""
    kind = model.config.model_type
    names = OUTPUTS.get(kind, OUTPUTS["llama"])
    base: Any = model.base_model
    layers = base.h if kind == "gpt2" else base.layers
    seen = [Seen() for _ in layers]

    def inputs(into: Seen, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        setattr(into, name, args[0].flatten(0, 1).double())

    def ends(into: Seen, module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        after = out[0] if isinstance(out, tuple) else out
        into.cosine = float(torch.cosine_similarity(args[0].double(), after.double(), dim=-1).mean())

    for into, layer in zip(seen, layers, strict=True):
        attention, mlp = (layer.get_submodule(name) for name in names)
        attention.register_forward_pre_hook(partial(inputs, into, "heads"))
        mlp.register_forward_pre_hook(partial(inputs, into, "neurons"))
        layer.register_forward_hook(partial(ends, into))
        into.attention_weight, into.mlp_weight = (
            (m.weight.detach().t() if isinstance(m, nn.Linear) else m.weight.detach()).double()
            for m in (attention, mlp)
        )
    hf_logits(model, TOKENS)
    return seen


def num_groups(model: PreTrainedModel) -> int:
    """KV heads; with a single one, query heads."""
    heads = int(model.config.num_attention_heads)
    kv_heads = int(getattr(model.config, "num_key_value_heads", heads))
    return heads if kv_heads == 1 else kv_heads


@pytest.mark.parametrize("case", CASES)
def test_activation_orders_equal_those_of_hooked_activations(case: str) -> None:
    model = random_model(case)
    importance = rank(decoder_of(model), TOKENS, "activation")
    assert (importance.method, importance.num_tokens) == ("activation", TOKENS.numel())
    heads, groups = model.config.num_attention_heads, num_groups(model)
    for seen, neurons, order in zip(observe(model), importance.neurons, importance.groups, strict=True):
        assert torch.equal(neurons, seen.neurons.abs().mean(0).argsort(descending=True))
        norms_NH = seen.heads.unflatten(1, (heads, -1)).norm(dim=-1)
        assert torch.equal(order, norms_NH.mean(0).view(groups, -1).sum(1).argsort(descending=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["activation", "reconstruction"])
def test_layer_scores_equal_hooked_similarities(case: str, method: Any) -> None:
    model = random_model(case)
    importance = rank(decoder_of(model), TOKENS, method)
    expected = [1 - seen.cosine for seen in observe(model)]
    assert importance.layer_scores == pytest.approx(expected, abs=1e-5)
    assert importance.layers_by_importance == tuple(sorted(range(3), key=lambda i: expected[i]))


def assert_greedy(removed: list[int], contributions_UND: Tensor) -> None:
    """Each unit removed changes the block's output least, of those left, given those gone."""
    gone = torch.zeros_like(contributions_UND[0])
    left = set(range(len(contributions_UND)))
    assert set(removed) == left
    for unit in removed:
        costs = {u: float((gone + contributions_UND[u]).square().sum()) for u in left}
        # float32 statistics may confuse near ties
        assert costs[unit] <= min(costs.values()) * (1 + 1e-4)
        gone = gone + contributions_UND[unit]
        left.remove(unit)


@pytest.mark.parametrize("case", CASES)
def test_reconstruction_orders_are_greedy_removals(case: str) -> None:
    model = random_model(case)
    importance = rank(decoder_of(model), TOKENS, "reconstruction")
    groups = num_groups(model)
    assert all(len(order) == groups for order in importance.groups)
    for seen, neurons, order in zip(observe(model), importance.neurons, importance.groups, strict=True):
        by_neuron = torch.einsum("nf,fd->fnd", seen.neurons, seen.mlp_weight)
        assert_greedy(neurons.flip(0).tolist(), by_neuron)
        by_group = torch.einsum(
            "ngr,grd->gnd",
            seen.heads.unflatten(1, (groups, -1)),
            seen.attention_weight.unflatten(0, (groups, -1)),
        )
        assert_greedy(order.flip(0).tolist(), by_group)


def test_the_two_methods_differ() -> None:
    decoder = random_decoder_of("llama")
    orders = [rank(decoder, TOKENS, method).neurons for method in ("activation", "reconstruction")]
    assert not all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


@given(st.integers(1, 9), st.integers(0, 10_000))
def test_removal_order_is_brute_force_greedy(size: int, seed: int) -> None:
    # fewer directions than units: some stand in for others
    factor = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quadratic = factor @ factor.t() + 1e-3 * torch.diag(factor[:, 0].abs())
    expected: list[int] = []
    while len(expected) < size:
        left = [u for u in range(size) if u not in expected]
        expected.append(min(left, key=lambda u: float(quadratic[[*expected, u]][:, [*expected, u]].sum())))
    assert removal_order(quadratic).tolist() == expected


def test_removal_order_sees_units_that_stand_in_for_each_other() -> None:
    # 0 and 1 cancel: both may go for nothing, though each alone is dear
    contributions = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [0.0, 2.5]], dtype=torch.float64)
    order = removal_order(contributions @ contributions.t()).tolist()
    costs = {pair: float(contributions[list(pair)].sum(0).square().sum()) for pair in combinations(range(4), 2)}
    assert min(costs, key=lambda pair: costs[pair]) == (0, 1)
    # greedy starts with the cheapest alone, and then prefers the pair to the dearer one
    assert order == [2, 0, 1, 3]

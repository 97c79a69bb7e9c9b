"""The closed-form start against least squares over stacked equations, written out for the first layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.layers import Layer, rotary_tables
from flextron.spec import SubnetSpec
from flextron.training.reconstruction import reconstruct
from tests.model.families_cases import random_tokens
from tests.toy import same_weights, toy_decoder, weights_of

TOKENS = random_tokens(10, 12)
"""More sequences than one chunk of the implementation's."""
FULL_WEIGHT, RIDGE = 2.0, 0.05
CASES = ["llama", "llama-3", "llama-mqa", "gpt2", "neox"]


def specs_for(decoder: Decoder) -> list[SubnetSpec]:
    """Heterogeneous ones; one skips a layer, one only an MLP."""
    groups = decoder.config.num_groups
    return [
        SubnetSpec.of([8, 24, 40], [groups, 1, groups]),
        SubnetSpec.of([24, 0, 8], [1, 0, groups]),
        SubnetSpec.of([0, 24, 24], [1, 1, 1]),
    ]


@torch.no_grad()
def residual(decoder: Decoder, spec: SubnetSpec) -> Tensor:
    """What leaves the last layer, before the final norm, (N, D)."""
    batch = Batch.padded(TOKENS, spec)
    rope = rotary_tables(decoder.config, batch.positions_N, decoder.dtype)
    x = decoder.embed(batch)
    for i, layer in enumerate(decoder.layers):
        x = layer(x, batch, i, rope, CausalAttention(decoder.config))
    return x


@pytest.mark.parametrize("case", CASES)
def test_it_brings_the_given_sub_networks_closer_to_the_original(case: str) -> None:
    decoder, original = toy_decoder(case=case), toy_decoder(case=case)
    specs = specs_for(decoder)
    target = residual(original, original.widths)
    reconstruct(decoder, TOKENS, specs, full_weight=FULL_WEIGHT, ridge=RIDGE)
    before, after = (
        [float((residual(d, s) - target).square().sum() / target.square().sum()) for s in specs]
        for d in (original, decoder)
    )
    assert all(b < a for a, b in zip(before, after, strict=True))
    assert sum(after) < 0.7 * sum(before)
    full_error = float((residual(decoder, original.widths) - target).square().sum() / target.square().sum())
    assert full_error < min(after)


@pytest.mark.parametrize("case", CASES)
def test_only_output_projections_move(case: str) -> None:
    decoder = toy_decoder(case=case)
    before = weights_of(decoder)
    reconstruct(decoder, TOKENS, specs_for(decoder))
    moved = {name for name, value in weights_of(decoder).items() if not torch.equal(value, before[name])}
    assert moved == {f"layers.{i}.{part}.weight" for i in range(3) for part in ("attention.o", "mlp.down")}


@pytest.mark.parametrize("case", CASES)
def test_a_full_model_that_outweighs_all_others_stays_put(case: str) -> None:
    decoder = toy_decoder(case=case)
    before = weights_of(decoder)
    reconstruct(decoder, TOKENS, specs_for(decoder), full_weight=1e6, ridge=RIDGE)
    for name, value in weights_of(decoder).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=2e-3)
    # the same call with an ordinary weight moves them far
    light = toy_decoder(case=case)
    reconstruct(light, TOKENS, specs_for(light), full_weight=1.0, ridge=RIDGE)
    name = "layers.0.mlp.down.weight"
    assert float((weights_of(light)[name] - before[name]).abs().max()) > 0.05


def test_sub_networks_that_are_the_full_one_change_nothing() -> None:
    decoder = toy_decoder()
    before = weights_of(decoder)
    reconstruct(decoder, TOKENS, [decoder.widths] * 2, ridge=RIDGE)
    assert not same_weights(weights_of(decoder), {})
    for name, value in weights_of(decoder).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-3)


def solve(inputs: list[tuple[Tensor, int]], targets: list[Tensor], old_DF: Tensor) -> Tensor:
    """Least squares over the stacked equations of all sub-networks (the full one first) and the ridge, (D, F)."""
    alphas = [FULL_WEIGHT, *[1 / (len(inputs) - 1)] * (len(inputs) - 1)]
    rows, right = [], []
    for (h_NF, width), target, alpha in zip(inputs, targets, alphas, strict=True):
        prefix = h_NF.double().clone()
        prefix[:, width:] = 0
        rows.append(alpha**0.5 * prefix)
        right.append(alpha**0.5 * target.double())
    size = old_DF.shape[1]
    pull = (RIDGE * sum(r.square().sum() for r in rows) / size) ** 0.5
    rows.append(torch.eye(size, dtype=torch.float64) * pull)
    right.append(pull * old_DF.double().t())
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(right)).solution.t().float()


def captured(layer: Layer, name: str, x_ND: Tensor, decoder: Decoder) -> Tensor:
    """Inputs of an output projection at full width, recomputed from the block's other weights."""
    batch = Batch.padded(TOKENS, decoder.widths)
    if name == "attention.o":
        rope = rotary_tables(decoder.config, batch.positions_N, decoder.dtype)
        groups = [decoder.config.num_groups]
        return layer.attention.heads(
            layer.attention_norm(x_ND), batch, groups, 0, rope, CausalAttention(decoder.config)
        )[0]
    blocks = batch.layout([decoder.config.intermediate_size]).blocks
    return layer.mlp.neurons(layer.mlp_norm(x_ND), blocks)[0]


def applied(layer: Layer, name: str, h_NF: Tensor, width: int) -> Tensor:
    """The output projection of the first `width` inputs; nothing at width 0."""
    if not width:
        return torch.zeros(())
    linear = layer.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    return torch.nn.functional.linear(h_NF[:, :width], linear.weight[:, :width], linear.bias)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_first_layer_is_the_least_squares_solution(case: str) -> None:
    decoder, original = toy_decoder(case=case), toy_decoder(case=case)
    specs = [decoder.widths, *specs_for(decoder)]
    reconstruct(decoder, TOKENS, specs[1:], full_weight=FULL_WEIGHT, ridge=RIDGE)
    new, old = decoder.layers[0], original.layers[0]
    assert isinstance(new, Layer)
    assert isinstance(old, Layer)
    x = original.embed(Batch.padded(TOKENS, original.widths))
    heads = captured(old, "attention.o", x, original)
    rows = [s.layers[0].num_groups * original.config.query_rows_per_group for s in specs]
    middle = x + applied(old, "attention.o", heads, rows[0])
    bias = old.attention.o.bias if old.attention.o.bias is not None else 0
    expected = solve([(heads, r) for r in rows], [middle - x - bias] * len(specs), old.attention.o.weight)
    torch.testing.assert_close(new.attention.o.weight, expected, rtol=0, atol=1e-3)

    neurons = captured(old, "mlp.down", x if old.parallel else middle, original)
    widths = [s.layers[0].intermediate_size for s in specs]
    after = middle + applied(old, "mlp.down", neurons, widths[0])
    bias = old.mlp.down.bias if old.mlp.down.bias is not None else 0
    # what the sub-networks' streams are, with the attention just solved
    streams = [x + applied(new, "attention.o", heads, r) for r in rows]
    inputs = [(captured(new, "mlp.down", x if new.parallel else m, decoder), w) for m, w in zip(streams, widths, strict=True)]
    used = [k for k, w in enumerate(widths) if w]
    targets = [after - m - bias for m in streams]
    expected = solve_used(inputs, targets, used, old.mlp.down.weight)
    torch.testing.assert_close(new.mlp.down.weight, expected, rtol=0, atol=2e-3)


def solve_used(inputs: list[tuple[Tensor, int]], targets: list[Tensor], used: list[int], old_DF: Tensor) -> Tensor:
    """As `solve`; a sub-network of width 0 has a constant residual and so no say, but still its share of the weight."""
    silent = [targets[k] if k in used else torch.zeros_like(targets[k]) for k in range(len(targets))]
    return solve(inputs, silent, old_DF)

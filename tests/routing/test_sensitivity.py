"""Sensitivities against the Fisher quadratic form, written out with masked weights and autograd through all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder, capped
from flextron.model.layers import Layer
from flextron.model.rope import rotary_tables
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.spec import SearchSpace, SubnetSpec
from tests.checkpoints.families_cases import random_tokens
from tests.toy import toy_decoder

TOKENS = random_tokens(3, 11)
CASES = ["llama", "llama-mqa", "qwen3", "gpt2", "neox"]


def space_for(decoder: Decoder) -> SearchSpace:
    return SearchSpace(
        num_hidden_layers=3, intermediate_sizes=(8, 24, 40), num_groups=tuple(range(1, decoder.config.num_groups + 1))
    )


def layer_of(decoder: Decoder, i: int) -> Layer:
    layer = decoder.layers[i]
    assert isinstance(layer, Layer)
    return layer


def half_layers(decoder: Decoder, i: int, x_ND: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor]:
    """The residual stream after the attention and after the MLP of layer `i`, each at one width."""
    batch = Batch.padded(TOKENS, decoder.widths)
    rope = rotary_tables(decoder.config, batch.positions_N, decoder.dtype)[i]
    core = CausalAttention(decoder.config)
    layer = layer_of(decoder, i)
    middle = x_ND + layer.attend(x_ND, batch, [groups], i, rope, core) if groups else x_ND
    mlp_input = x_ND if decoder.config.parallel_residual else middle
    return middle, middle + layer.feed_forward(mlp_input, batch, [width]) if width else middle


def surprise(decoder: Decoder, i: int, half: int, x_ND: Tensor, targets: Tensor, entering: Tensor) -> Tensor:
    """Total loss of the targets if the stream after half layer (i, half) is `x_ND`."""
    full, groups = decoder.config.intermediate_size, decoder.config.num_groups
    if half == 0:
        batch = Batch.padded(TOKENS, decoder.widths)
        mlp_input = entering if decoder.config.parallel_residual else x_ND
        x_ND = x_ND + layer_of(decoder, i).feed_forward(mlp_input, batch, [full])
    for k in range(i + 1, len(decoder.layers)):
        x_ND = half_layers(decoder, k, x_ND, groups, full)[1]
    logits = capped(decoder.final_norm(x_ND) @ decoder.head_weight.t(), decoder.config.logits_cap)
    return F.cross_entropy(logits, targets, reduction="sum")


def expected_cost(decoder: Decoder, i: int, half: int, width: int, targets: Tensor) -> float:
    """½ E[(gᵀ e)²] for one half layer, with g differentiated from there on."""
    full, groups = decoder.config.intermediate_size, decoder.config.num_groups
    with torch.no_grad():
        x = decoder.embed(Batch.padded(TOKENS, decoder.widths))
        for k in range(i):
            x = half_layers(decoder, k, x, groups, full)[1]
        reference = half_layers(decoder, i, x, groups, full)[half]
        if half == 0:
            narrowed = half_layers(decoder, i, x, width, full)[0]
        else:
            narrowed = half_layers(decoder, i, x, groups, width)[1]
    stream = reference.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surprise(decoder, i, half, stream, targets, x), stream)
    return 0.5 * float(((narrowed - reference) * gradient).sum(-1).square().mean())


@torch.no_grad()
def drawn_targets(decoder: Decoder, seed: int) -> Tensor:
    """Tokens from the model's own distribution, drawn as the seed has it."""
    logits = decoder.logits(decoder(Batch.padded(TOKENS, decoder.widths)))
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("case", CASES)
def test_costs_are_the_fisher_quadratic_form(case: str) -> None:
    decoder = toy_decoder(case=case)
    space = space_for(decoder)
    measured = measure_sensitivity(decoder, TOKENS, space, seed=5)
    targets = drawn_targets(decoder, 5)
    for i in range(3):
        for half, table, widths in ((0, measured.attention[i], space.num_groups), (1, measured.mlp[i], (8, 24, 40))):
            assert set(table) == {0, *widths}
            assert table[widths[-1]] == 0
            for width in (0, *widths[:-1]):
                assert table[width] == pytest.approx(expected_cost(decoder, i, half, width, targets), rel=1e-3)
                assert table[width] > 0


AROUND = SubnetSpec.of([24, 0, 8], [1, 0, 1])


def changed_loss(decoder: Decoder, i: int, half: int, width: int, share: Tensor) -> Tensor:
    """Mean loss of the next tokens if a share of each token's change by one half layer of `AROUND` is made, (N,)."""
    x = decoder.embed(Batch.padded(TOKENS, AROUND)).detach()
    for k, layer in enumerate(AROUND.layers):
        entering = x
        after, x = half_layers(decoder, k, entering, layer.num_groups, layer.intermediate_size)
        if k != i:
            continue
        if half == 0:
            other = half_layers(decoder, k, entering, width, layer.intermediate_size)[0]
            after = after + share[:, None] * (other - after).detach()
            mlp_input = entering if decoder.config.parallel_residual else after
            batch = Batch.padded(TOKENS, decoder.widths)
            size = layer.intermediate_size
            x = after + layer_of(decoder, k).feed_forward(mlp_input, batch, [size]) if size else after
        else:
            other = half_layers(decoder, k, entering, layer.num_groups, width)[1]
            x = x + share[:, None] * (other - x).detach()
    logits = capped(decoder.final_norm(x) @ decoder.head_weight.t(), decoder.config.logits_cap)
    logits = logits.unflatten(0, tuple(TOKENS.shape))[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("case", CASES)
def test_around_a_sub_network_costs_have_both_orders(case: str) -> None:
    decoder = toy_decoder(case=case)
    space = space_for(decoder)
    measured = measure_sensitivity(decoder, TOKENS, space, around=AROUND)
    for i, own in enumerate(AROUND.layers):
        tables = (measured.attention[i], own.num_groups), (measured.mlp[i], own.intermediate_size)
        for half, (table, own_width) in enumerate(tables):
            assert table[own_width] == 0
            for width in set(table) - {own_width}:
                share = torch.zeros(TOKENS.numel(), requires_grad=True)
                (slope_N,) = torch.autograd.grad(changed_loss(decoder, i, half, width, share), share)
                second = 0.5 * float((slope_N * len(share)).square().mean())
                assert table[width] == pytest.approx(float(slope_N.sum()) + second, rel=1e-3, abs=1e-6)


def test_the_mean_of_sensitivities_and_the_price_of_change() -> None:
    first = Sensitivity(mlp=({0: 1.0, 4: 0.0},), attention=({0: 3.0, 1: 0.0},))
    second = Sensitivity(mlp=({0: 2.0, 4: 0.0},), attention=({0: -1.0, 1: 0.5},))
    mean = Sensitivity.mean([first, second])
    assert mean == Sensitivity(mlp=({0: 1.5, 4: 0.0},), attention=({0: 1.0, 1: 0.25},))
    priced = mean.with_price_of_change(SubnetSpec.of([4], [0]), 0.5)
    assert priced == Sensitivity(mlp=({0: 2.0, 4: 0.0},), attention=({0: 1.0, 1: 0.75},))


def test_the_same_seed_gives_the_same_costs_and_leaves_no_gradient() -> None:
    decoder = toy_decoder().requires_grad_(True)
    space = space_for(decoder)
    first, second, other = (measure_sensitivity(decoder, TOKENS, space, seed=s) for s in (0, 0, 1))
    for a, b, c in zip(
        (*first.mlp, *first.attention), (*second.mlp, *second.attention), other.mlp + other.attention, strict=True
    ):
        assert a == pytest.approx(b)
        assert a != pytest.approx(c)
    assert all(p.grad is None for p in decoder.parameters())


def test_terms_are_sums_by_kind() -> None:
    sensitivity = Sensitivity(
        mlp=({0: 1.0, 4: 0.5, 8: 0.0}, {0: 2.0, 4: 0.25, 8: 0.0}, {0: 4.0, 4: 3.0, 8: 0.0}),
        attention=({0: 8.0, 1: 0.125, 2: 0.0}, {0: 16.0, 1: 6.0, 2: 0.0}, {0: 32.0, 1: 7.0, 2: 0.0}),
    )
    # the second layer is skipped whole, the third only in one half
    assert sensitivity.terms(SubnetSpec.of([4, 0, 0], [1, 0, 2])) == (4.5, 0.125, 18.0)
    assert sensitivity.terms(SubnetSpec.of([8, 8, 8], [2, 2, 2])) == (0.0, 0.0, 0.0)

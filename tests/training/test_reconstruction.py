"""The closed-form start against least squares over stacked equations, written out for the first layer."""

from __future__ import annotations

from dataclasses import dataclass

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
    assert isinstance(x, Tensor)
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


def solve(inputs: list[tuple[Tensor, int]], targets: list[Tensor], old_FD: Tensor) -> Tensor:
    """Least squares over the stacked equations of all sub-networks (the full one first) and the ridge, (F, D)."""
    alphas = [FULL_WEIGHT, *[1 / (len(inputs) - 1)] * (len(inputs) - 1)]
    rows, right = [], []
    for (h_NF, width), target, alpha in zip(inputs, targets, alphas, strict=True):
        # a sub-network that skips this half has no say in it
        prefix = h_NF.double().clone()
        prefix[:, width:] = 0
        rows.append(alpha**0.5 * prefix)
        right.append(alpha**0.5 * target.double())
    size = len(old_FD)
    pull = (RIDGE * sum(r.square().sum() for r in rows) / size) ** 0.5
    rows.append(torch.eye(size, dtype=torch.float64) * pull)
    right.append(pull * old_FD.double())
    solution: Tensor = torch.linalg.lstsq(torch.cat(rows), torch.cat(right)).solution
    return solution.float()


@dataclass(frozen=True)
class Half:
    """One half of the first layer at full width, as plain matrices."""

    decoder: Decoder
    part: str

    @property
    def layer(self) -> Layer:
        layer = self.decoder.layers[0]
        assert isinstance(layer, Layer)
        return layer

    def inputs(self, x_ND: Tensor) -> Tensor:
        """What enters the output projection, (N, F), if `x_ND` enters the half."""
        config, batch = self.decoder.config, Batch.padded(TOKENS, self.decoder.widths)
        if self.part == "mlp":
            return self.layer.mlp.neurons(self.layer.mlp_norm(x_ND), batch.layout([config.intermediate_size]).blocks)[0]
        rope = rotary_tables(config, batch.positions_N, self.decoder.dtype)
        core = CausalAttention(config)
        return self.layer.attention.heads(self.layer.attention_norm(x_ND), batch, [config.num_groups], 0, rope, core)[0]

    def project(self, h_NF: Tensor) -> Tensor:
        """The output projection of any rows, bias included."""
        config, batch = self.decoder.config, Batch.padded(torch.zeros(1, len(h_NF)).long(), self.decoder.widths)
        if self.part == "mlp":
            return self.layer.mlp.project(len(h_NF), (h_NF,), batch.layout([config.intermediate_size]))
        return self.layer.attention.project([h_NF], batch, [config.num_groups])

    @property
    def size(self) -> int:
        config = self.decoder.config
        return config.intermediate_size if self.part == "mlp" else config.num_groups * config.query_rows_per_group

    @property
    def bias(self) -> Tensor:
        return self.project(torch.zeros(1, self.size))

    @property
    def weight(self) -> Tensor:
        """(F, D), however it is stored."""
        return self.project(torch.eye(self.size)) - self.bias


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_first_layer_is_the_least_squares_solution(case: str) -> None:
    decoder, original = toy_decoder(case=case), toy_decoder(case=case)
    config = original.config
    specs = [decoder.widths, *specs_for(decoder)]
    reconstruct(decoder, TOKENS, specs[1:], full_weight=FULL_WEIGHT, ridge=RIDGE)
    x = original.embed(Batch.padded(TOKENS, original.widths))
    new, old = Half(decoder, "attention"), Half(original, "attention")
    heads = old.inputs(x)
    rows = [s.layers[0].num_groups * config.query_rows_per_group for s in specs]
    middle = x + old.project(heads)
    expected = solve([(heads, r) for r in rows], [middle - x - old.bias] * len(specs), old.weight)
    torch.testing.assert_close(new.weight, expected, rtol=0, atol=1e-3)

    # where the sub-networks stand, with the attention just solved
    streams = [x + heads[:, :r] @ new.weight[:r] + new.bias for r in rows]
    new, old = Half(decoder, "mlp"), Half(original, "mlp")
    parallel = config.parallel_residual
    after = middle + old.project(old.inputs(x if parallel else middle))
    widths = [s.layers[0].intermediate_size for s in specs]
    inputs = [(new.inputs(x if parallel else m), w) for m, w in zip(streams, widths, strict=True)]
    expected = solve(inputs, [after - m - old.bias for m in streams], old.weight)
    torch.testing.assert_close(new.weight, expected, rtol=0, atol=1e-3)

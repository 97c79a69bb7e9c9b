"""The fused low-rank update of a batch against the general bypasses, which take each segment apart, and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flextron.model.batch import Batch
from flextron.model.bypass import Bypasses, Lora, Shape
from flextron.model.low_rank import SharedLora
from flextron.model.nested import Contraction, Layout
from tests.checkpoints.families_cases import MECHANISMS, random_tokens
from tests.model.adapter_cases import random_lora
from tests.random_decoders import ragged_specs, random_decoder


def lora(inputs: int, outputs: int) -> Lora:
    bypass = Lora(Shape(inputs, outputs), 3, 0.7).double()
    nn.init.normal_(bypass.b)
    return bypass


def gradients(outputs: tuple[Tensor, ...], weights: list[Tensor], of: list[Tensor]) -> list[Tensor]:
    total = torch.stack([(y * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
    return list(torch.autograd.grad(total, of, materialize_grads=True))


segments = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 5, 8])), min_size=1, max_size=4).filter(
    lambda s: any(width for _, width in s)
)


@given(segments)
@settings(deadline=None)
def test_expanding_equals_the_products_of_whole_weights(parts: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    layout = Layout.of(tuple(n for n, _ in parts), tuple(w for _, w in parts))
    linear = nn.Linear(6, 8).double().requires_grad_(False)
    bypass = lora(6, 8)
    x = torch.randn(sum(layout.sizes), 6, dtype=torch.float64, requires_grad=True)
    ours = SharedLora({"up": bypass}).expand("up", x, linear, layout.blocks)
    merged = linear.weight + bypass.scale * bypass.b @ bypass.a.t()
    whole = nn.functional.linear(x, merged, linear.bias)
    right = tuple(whole[: k.num_tokens, k.start : k.stop] for k in layout.blocks)
    weights = [torch.randn_like(y) for y in ours]
    of = [x, bypass.a, bypass.b]
    for got, wanted in zip(
        (*ours, *gradients(ours, weights, of)), (*right, *gradients(right, weights, of)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@given(segments)
@settings(deadline=None)
def test_contracting_equals_the_products_of_whole_weights(parts: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    layout = Layout.of(tuple(n for n, _ in parts), tuple(w for _, w in parts))
    num_tokens = sum(layout.sizes)
    linear = Contraction(8, 6, bias=False).double().requires_grad_(False)
    bypass = lora(8, 6)
    h = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    blocks = [h[: k.num_tokens, k.start : k.stop] for k in layout.blocks]
    ours = SharedLora({"down": bypass}).contract("down", num_tokens, blocks, linear, layout.blocks)
    mask = torch.zeros_like(h)
    for k in layout.blocks:
        mask[: k.num_tokens, k.start : k.stop] = 1
    right = (h * mask) @ (linear.weight + bypass.scale * bypass.a @ bypass.b.t())
    weights = [torch.randn_like(ours)]
    of = [h, bypass.a, bypass.b]
    for got, wanted in zip(
        (ours, *gradients((ours,), weights, of)), (right, *gradients((right,), weights, of)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", MECHANISMS)
def test_a_batch_with_one_adapter_equals_its_segments_taken_apart(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(family).double()
    adapter = random_lora(decoder.config).double()
    batch = Batch.dealt(random_tokens(4, 5), ragged_specs(decoder.config, 4), adapter=adapter)

    def run() -> list[Tensor]:
        h = decoder(batch)
        return [h, *torch.autograd.grad(h.square().sum(), list(adapter.parameters()), materialize_grads=True)]

    ours = run()
    monkeypatch.setattr(Batch, "bypasses", lambda self, layer, layout: Bypasses(self.placed(layer, layout)))
    for got, wanted in zip(ours, run(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)

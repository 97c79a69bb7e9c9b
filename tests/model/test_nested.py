"""`expand` and `contract` against dense products with a mask over (token, neuron), forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flextron.model.nested import Block, Layout, contract, expand

SIZE, NESTED = 3, 6


@dataclass(frozen=True)
class Problem:
    """Segments of tokens, each with a width; some widths may be 0, not all."""

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    bias: bool
    seed: int

    @property
    def layout(self) -> Layout:
        return Layout.of(self.sizes, self.widths)

    @property
    def mask(self) -> Tensor:
        """Which nested positions each token has, in the batch's order; (N, F)."""
        per_token = torch.tensor([w for n, w in zip(self.sizes, self.widths, strict=True) for _ in range(n)])
        return (torch.arange(NESTED) < per_token[:, None]).double()

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def problems() -> st.SearchStrategy[Problem]:
    segments = st.lists(st.tuples(st.integers(1, 3), st.integers(0, NESTED)), min_size=1, max_size=5)
    return st.builds(
        lambda pairs, bias, seed: Problem(tuple(n for n, _ in pairs), tuple(w for _, w in pairs), bias, seed),
        segments.filter(lambda pairs: any(w for _, w in pairs)),
        st.booleans(),
        st.integers(0, 1000),
    )


def side_by_side(parts: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """What `expand` gave as one (N, F) tensor in the batch's order, 0 where a token does not reach."""
    rows = sum(layout.sizes)
    padded = [
        F.pad(part, (b.start, NESTED - b.stop, 0, rows - b.num_tokens))
        for b, part in zip(layout.blocks, parts, strict=True)
    ]
    return layout.unsort(torch.stack(padded).sum(0))


def cut(h_NF: Tensor, layout: Layout) -> list[Tensor]:
    """The inverse of `side_by_side`."""
    ordered = layout.sort(h_NF)
    return [ordered[: b.num_tokens, b.start : b.stop] for b in layout.blocks]


def assert_same_gradients(ours: Tensor, masked: Tensor, inputs: list[Tensor | None]) -> None:
    given_inputs = [x for x in inputs if x is not None]
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    mine = torch.autograd.grad(ours, given_inputs, direction)
    theirs = torch.autograd.grad(masked, given_inputs, direction)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@given(problems())
def test_blocks_give_each_token_its_prefix(problem: Problem) -> None:
    layout, rows = problem.layout, torch.arange(sum(problem.sizes))
    covered = torch.zeros(len(rows), NESTED)
    for block in layout.blocks:
        covered[layout.sort(rows)[: block.num_tokens], block.start : block.stop] += 1
    assert torch.equal(covered, problem.mask.float())


@given(problems())
def test_unsort_undoes_sort_and_sort_puts_the_widest_first(problem: Problem) -> None:
    layout, rows = problem.layout, torch.arange(sum(problem.sizes))
    assert torch.equal(layout.unsort(layout.sort(rows)), rows)
    widths = problem.mask.sum(1)[layout.sort(rows)]
    assert torch.equal(widths, widths.sort(descending=True).values)


@given(problems())
def test_expand_is_a_masked_dense_product(problem: Problem) -> None:
    layout = problem.layout
    x, w = problem.random(sum(problem.sizes), SIZE), problem.random(NESTED, SIZE)
    b = problem.random(NESTED) if problem.bias else None
    masked = F.linear(x, w, b) * problem.mask
    ours = side_by_side(expand(layout.sort(x), w, b, layout.blocks), layout)
    torch.testing.assert_close(ours, masked)
    assert_same_gradients(ours, masked, [x, w, b])
    with torch.no_grad():
        torch.testing.assert_close(side_by_side(expand(layout.sort(x), w, b, layout.blocks), layout), masked)


@given(problems())
def test_contract_is_a_masked_dense_product_and_0_at_width_0(problem: Problem) -> None:
    layout, rows = problem.layout, sum(problem.sizes)
    h, w = problem.random(rows, NESTED), problem.random(NESTED, SIZE)
    b = problem.random(SIZE) if problem.bias else None
    masked = F.linear(h * problem.mask, w.t(), b) * problem.mask[:, :1]
    ours = layout.unsort(contract(rows, cut(h, layout), w, b, layout.blocks))
    torch.testing.assert_close(ours, masked)
    assert_same_gradients(ours, masked, [h, w, b])
    with torch.no_grad():
        torch.testing.assert_close(layout.unsort(contract(rows, cut(h, layout), w, b, layout.blocks)), masked)


PROBLEM = Problem(sizes=(2, 1, 3, 1), widths=(2, 0, 5, 3), bias=True, seed=0)


def test_gradcheck() -> None:
    layout, rows = PROBLEM.layout, sum(PROBLEM.sizes)
    x, w_in, w_out = PROBLEM.random(rows, SIZE), PROBLEM.random(NESTED, SIZE), PROBLEM.random(NESTED, SIZE)
    b_in, b_out = PROBLEM.random(NESTED), PROBLEM.random(SIZE)

    def mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        h = [t.tanh() for t in expand(layout.sort(x), w_in, b_in, layout.blocks)]
        return layout.unsort(contract(rows, h, w_out, b_out, layout.blocks))

    assert torch.autograd.gradcheck(mlp, (x, w_in, b_in, w_out, b_out))


def test_weight_gradients_are_0_beyond_the_widest_prefix() -> None:
    layout, rows = PROBLEM.layout, sum(PROBLEM.sizes)
    x, w, h, v = (PROBLEM.random(*s) for s in ((rows, SIZE), (NESTED, SIZE), (rows, NESTED), (NESTED, SIZE)))
    side_by_side(expand(layout.sort(x), w, None, layout.blocks), layout).square().sum().backward()
    contract(rows, cut(h, layout), v, None, layout.blocks).square().sum().backward()
    assert w.grad is not None
    assert v.grad is not None
    assert not w.grad[5:].any()
    assert w.grad[:5].all()
    assert not v.grad[5:].any()
    assert v.grad[:5].all()


@pytest.mark.parametrize("frozen", ["x", "w", "b"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(frozen: str) -> None:
    layout, rows = PROBLEM.layout, sum(PROBLEM.sizes)
    tensors = {"x": PROBLEM.random(rows, SIZE), "w": PROBLEM.random(NESTED, SIZE), "b": PROBLEM.random(NESTED)}
    tensors[frozen].requires_grad_(False)
    ours = side_by_side(expand(layout.sort(tensors["x"]), tensors["w"], tensors["b"], layout.blocks), layout)
    masked = F.linear(tensors["x"], tensors["w"], tensors["b"]) * PROBLEM.mask
    assert_same_gradients(ours, masked, [t for t in tensors.values() if t.requires_grad])


def test_autocast_lowers_the_products_and_not_the_gradients() -> None:
    layout, rows = PROBLEM.layout, sum(PROBLEM.sizes)
    x, w = (PROBLEM.random(*s).detach().float().requires_grad_() for s in ((rows, SIZE), (NESTED, SIZE)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = expand(layout.sort(x), w, None, layout.blocks)
        assert {p.dtype for p in parts} == {torch.bfloat16}
    side_by_side(parts, layout).float().sum().backward()
    reference = torch.autograd.grad((F.linear(x, w) * PROBLEM.mask.float()).sum(), [x, w])
    for tensor, expected in zip((x, w), reference, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, expected, rtol=2e-2, atol=2e-2)


def test_scaled_blocks_cover_whole_units() -> None:
    assert Block(4, 1, 3).scaled(8) == Block(4, 8, 24)

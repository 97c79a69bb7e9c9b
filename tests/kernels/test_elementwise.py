"""Compiled norms, gates and vocabulary losses against autograd in float64, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flextron.kernels import elementwise as kernels
from flextron.kernels.build import load_library
from flextron.losses.vocabulary import vocabulary_losses

LIBRARY = load_library("training")
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no kernels: {LIBRARY}")

DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
SIZES = st.integers(1, 70)  # below, at and beyond multiples of a vector
# results are rounded once; between, all is float32
BARS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def drawn(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_same(ours: Tensor, exact: Tensor, bar: float, floor: float = 1e-3) -> None:
    """Within `bar` of the largest number, or of `floor` if that is larger."""
    assert ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= bar * exact.abs().max().clamp(min=floor)


def compare(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor], floor: float = 1e-3
) -> None:
    """Value and gradients; float32 inputs (gains) beside bfloat16 ones have their own bar."""
    bar = 2 * BARS[inputs[0].dtype]
    own = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.double().requires_grad_() for t in inputs]
    out, wanted = ours(*own), exact(*theirs)
    assert out.dtype == inputs[0].dtype
    assert_same(out.detach(), wanted.detach(), bar)
    g = drawn(9, *out.shape, dtype=out.dtype)
    out.backward(g)
    wanted.backward(g.double())
    for t, w in zip(own, theirs, strict=True):
        assert t.grad is not None
        assert w.grad is not None
        assert t.grad.dtype == t.dtype
        assert_same(t.grad, w.grad, BARS[t.dtype] if t.dtype == torch.bfloat16 else 2e-5, floor)


@given(rows=st.integers(1, 9), size=SIZES, dtype=DTYPES, seed=st.integers(0, 99), threads=st.sampled_from((1, 2)))
def test_norms(rows: int, size: int, dtype: torch.dtype, seed: int, threads: int) -> None:
    x, gains = drawn(seed, rows, 1, size, dtype=dtype, scale=3), drawn(seed + 1, size, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(
            lambda x, w: kernels.rms_norm_compiled(x, w, 1e-5),
            lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w,
            [x, gains],
            # a gradient is a difference of terms as large as this one
            float(4 * gains.abs().max() * (x.double().square().mean(-1) + 1e-5).rsqrt().max()),
        )
    finally:
        torch.set_num_threads(before)


@given(size=SIZES, dtype=DTYPES, seed=st.integers(0, 99), scale=st.sampled_from((0.1, 3.0, 60.0)))
def test_gates(size: int, dtype: torch.dtype, seed: int, scale: float) -> None:
    inputs = [drawn(seed + i, 3, size, dtype=dtype, scale=scale) for i in range(2)]
    compare(kernels.silu_gate, lambda g, u: F.silu(g) * u, inputs)


def test_what_there_is_no_kernel_for_runs_by_operators() -> None:
    x, gains = drawn(0, 4, 8, dtype=torch.float64), drawn(1, 8, dtype=torch.float64)
    assert torch.equal(kernels.rms_norm_compiled(x, gains, 1e-5), F.rms_norm(x, (8,), gains, 1e-5))
    assert torch.equal(kernels.silu_gate(x, x), F.silu(x) * x)


@given(
    tokens=st.integers(1, 300),
    vocabulary=st.integers(2, 90),
    dtype=DTYPES,
    seed=st.integers(0, 99),
    with_teacher=st.booleans(),
    with_targets=st.booleans(),
    scale=st.sampled_from((1.0, 20.0)),
)
def test_vocabulary_losses(
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    seed: int,
    with_teacher: bool,
    with_targets: bool,
    scale: float,
) -> None:
    """Both losses and the gradient by the logits, against one expression over all tokens."""
    # an identity as the head: hidden states are logits, so that nothing but the losses is rounded
    head = torch.eye(vocabulary, dtype=dtype)
    h = drawn(seed, tokens, vocabulary, dtype=dtype, scale=scale).requires_grad_()
    t = drawn(seed + 1, tokens, vocabulary, dtype=dtype, scale=scale)
    targets = torch.randint(-1, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    found = vocabulary_losses(
        h,
        head,
        teacher=(t, head) if with_teacher else None,
        targets_N=targets if with_targets else None,
        weights=(0.7, 1.3),
        chunk=kernels.chunk_losses_compiled,
    )
    exact = h.detach().double().requires_grad_()
    log_p = exact.log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64)
    kl = F.kl_div(log_p, t.double().log_softmax(-1), log_target=True, reduction="batchmean") if with_teacher else zero
    has_targets = with_targets and bool((targets >= 0).any())
    lm = F.nll_loss(log_p, targets, ignore_index=-1) if has_targets else zero
    bar = 1e-5 * (1 + scale)
    assert float(found.kl) == pytest.approx(float(kl.detach()), abs=bar)
    assert float(found.lm) == pytest.approx(float(lm.detach()), abs=bar)
    assert float(found.total.detach()) == pytest.approx(float((0.7 * kl + 1.3 * lm).detach()), abs=2 * bar)
    found.total.backward()
    assert h.grad is not None
    if not with_teacher and not has_targets:
        assert not h.grad.any()
        return
    (0.7 * kl + 1.3 * lm).backward()
    assert exact.grad is not None
    assert_same(h.grad, exact.grad, BARS[dtype] if dtype == torch.bfloat16 else 2e-5, floor=1 / tokens)

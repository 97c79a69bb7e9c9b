"""The compiled training kernels against the textbook in float64, and finetuning with them and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flextron.finetuning import attention_torch
from flextron.finetuning.layerwise import Finetuning
from flextron.finetuning.units import Stage
from flextron.kernels import training as kernels
from flextron.kernels.build import load_library
from flextron.kernels.elementwise import silu_gate
from tests.checkpoints.families_cases import MECHANISMS
from tests.finetuning.test_layerwise import examples_of, gradients, run
from tests.model.adapter_cases import random_lora
from tests.random_decoders import random_decoder

LIBRARY = load_library("training")
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no kernels: {LIBRARY}")

BAR = 5e-5  # of float32: gradients are differences of terms that are up to a hundred times as large


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def textbook(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, g: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and log-sums, and gradients of queries, keys and values; all in float64, every score at once."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    held = len(k) - sum(lengths)
    sequence = torch.cat([torch.zeros(held), *(torch.full((n,), s) for s, n in enumerate(lengths))])
    position = torch.arange(len(k))
    distance = position[held:, None] - position
    seen = (sequence[held:, None] == sequence) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    repeats = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(repeats, 1)) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v.repeat_interleave(repeats, 1))
    out.backward(g.double())
    return [out.detach(), scores.logsumexp(-1).t().detach()], [t.grad for t in (q, k, v) if t.grad is not None]


def assert_close(ours: Tensor, expected: Tensor, what: str) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((ours.double() - expected).abs().max()) <= BAR * scale, what


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    held=st.sampled_from([0, 0, 1, 17, 100]),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 7, 50]), st.sampled_from([8, 16, 24, 40, 64])),
    window=st.none() | st.integers(1, 200),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
    compiled=st.booleans(),
)
def test_attention_is_the_textbooks(
    lengths: list[int],
    held: int,
    shape: tuple[int, int, int],
    window: int | None,
    needs: tuple[bool, bool, bool],
    count: int,
    seed: int,
    compiled: bool,
) -> None:
    num_kv, repeats, head_dim = shape
    num_tokens, generator = sum(lengths), torch.Generator().manual_seed(seed)
    q, g = torch.randn(2, num_tokens, num_kv * repeats, head_dim, generator=generator)
    k, v = torch.randn(2, held + num_tokens, num_kv, head_dim, generator=generator)
    q = q * 3  # shares far from equal
    form = kernels if compiled else attention_torch
    with threads(count):
        given_ = form.attend(q, k, v, lengths, window)
        found = form.attend_backward(q, k, v, lengths, window, given_, g, needs)
    forward, backward = textbook(q, k, v, lengths, window, g)
    for name, ours, expected in zip(("out", "lse"), given_, forward, strict=True):
        assert_close(ours, expected, name)
    for name, needed, grad, expected in zip("qkv", needs, found, backward, strict=True):
        if not needed:
            assert grad is None
        else:
            assert grad is not None
            assert_close(grad, expected, f"gradient of {name}")


def test_tensors_may_be_parts_of_others() -> None:
    torch.manual_seed(0)
    together = torch.randn(70, 8, 16)
    q, k = together.split([6, 2], 1)
    v = torch.randn(70, 16, 2).transpose(1, 2)
    g = torch.randn(70, 1, 1).expand(70, 6, 16)
    given_ = kernels.attend(q, k, v, [70], None)
    found = kernels.attend_backward(q, k, v, [70], None, given_, g, (True, True, True))
    forward, backward = textbook(q, k, v, [70], None, g)
    for ours, expected in zip((*given_, *found), (*forward, *backward), strict=True):
        assert ours is not None
        assert_close(ours, expected, "parts")


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(100, 2, 16) for _ in range(4))
    given_ = kernels.attend(q * 200, k, v, [100], None)
    found = kernels.attend_backward(q * 200, k, v, [100], None, given_, g, (True, True, True))
    forward, _ = textbook(q * 200, k, v, [100], None, g)
    assert float((given_[1].double() / forward[1] - 1).abs().max()) < 1e-5
    assert all(t is not None and bool(t.isfinite().all()) for t in (*given_, *found))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_number_of_threads_gives_the_same_numbers(count: int) -> None:
    torch.manual_seed(0)
    q, g = torch.randn(2, 300, 6, 32)
    k, v = torch.randn(2, 350, 3, 32)
    lengths = [200, 100]
    with threads(count):
        runs = []
        for _ in range(5):
            given_ = kernels.attend(q, k, v, lengths, None)
            found = kernels.attend_backward(q, k, v, lengths, None, given_, g, (True, True, True))
            runs.append([t for t in (*given_, *found) if t is not None])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 7), (3, 8), (7, 5), (300, 64)])
def test_the_gate_of_an_mlp(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate, up, g = torch.randn(3, *shape)
    guarded = [torch.cat((t.flatten(), torch.tensor([torch.nan] * 8))) for t in (gate, up, g)]
    gate, up, g = (t[:-8].view(shape) for t in guarded)
    gate.view(-1)[:6] = torch.tensor([-200.0, -88.0, -20.0, 0.0, 88.0, 200.0])
    gate, up = gate.requires_grad_(), up.requires_grad_()
    out = silu_gate(gate, up)
    found = torch.autograd.grad(out, (gate, up), g)
    gate64, up64 = (t.detach().double().requires_grad_() for t in (gate, up))
    expected = F.silu(gate64) * up64
    for ours, theirs in zip((out, *found), (expected, *torch.autograd.grad(expected, (gate64, up64), g)), strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("keep", [(), ("q", "attention", "o", "gate", "up")], ids=["recomputed", "kept"])
@pytest.mark.parametrize("case", MECHANISMS)
def test_finetuning_with_kernels_and_without(case: str, keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(case)
    adapter = random_lora(decoder.config)
    found = []
    for setting in ("1", "0"):
        monkeypatch.setenv("FLEXTRON_NATIVE", setting)
        load_library.cache_clear()
        try:
            assert isinstance(load_library("training"), str) == (setting == "0")
            work = Finetuning(decoder, adapter, examples_of([60, 9, 33]), keep=keep)
            run(work, [40, 7], [25, 3])
            assert work.stage is None
            found.append(gradients(adapter))
        finally:
            load_library.cache_clear()
    compiled, plain = found
    largest = max(float(g.abs().max()) for g in plain.values())
    for name, g in plain.items():
        scale = max(float(g.abs().max()), 1e-3 * largest)
        assert float((compiled[name] - g).abs().max()) <= 1e-4 * scale, name


def test_what_the_heads_gave_is_kept_for_the_way_back() -> None:
    decoder = random_decoder("llama")
    work = Finetuning(decoder, random_lora(decoder.config), examples_of([60, 50]), keep=["attention"])
    while work.stage is not Stage.BACKWARD:
        work.run(50)
    saved = work.saved
    assert set(saved.heads) == set(saved.lse) == set(saved.inputs)
    assert all(len(t) == work.num_tokens for of in (saved.heads, saved.lse) for t in of.values())

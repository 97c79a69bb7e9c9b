"""The chunked losses against plain autograd over all the logits at once, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.losses.likelihoods import scored, token_losses, token_scores
from flextron.losses.vocabulary import CHUNK_TOKENS, cross_entropy, forward_kl, head_metric, summed_cross_entropy
from flextron.model.decoder import capped

SIZE, VOCAB = 12, 37
COUNTS = [1, 5, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head(seed: int) -> Tensor:
    return random(VOCAB, SIZE, seed=seed) * 0.5


def targets(num_tokens: int) -> Tensor:
    return torch.randint(VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(9))


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def assert_close(ours: Tensor | None, reference: Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(ours.double(), reference.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_equals_autograd(num_tokens: int, temperature: float) -> None:
    h, w = random(num_tokens, SIZE, seed=0).requires_grad_(), head(1).requires_grad_()
    # a teacher of another width
    teacher_h, teacher_w = random(num_tokens, 8, seed=2), random(VOCAB, 8, seed=3)
    loss = forward_kl(h, w, teacher_h, teacher_w, temperature)
    h64, w64, th64, tw64 = doubles(h, w, teacher_h, teacher_w)
    student = F.log_softmax(h64 @ w64.t() / temperature, -1)
    teacher = F.log_softmax(th64 @ tw64.t() / temperature, -1)
    reference = (teacher.exp() * (teacher - student)).sum(-1).mean() * temperature**2
    assert_close(loss, reference)
    (3 * loss).backward()
    (3 * reference).backward()
    for ours, theirs in ((h, h64), (w, w64)):
        assert theirs.grad is not None
        assert_close(ours.grad, theirs.grad)


def test_forward_kl_is_0_for_equal_models_and_gives_the_teacher_no_gradient() -> None:
    h, w = random(7, SIZE, seed=0).requires_grad_(), head(1).requires_grad_()
    loss = forward_kl(h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_(), h, w)
    assert abs(float(loss.detach())) < 1e-6
    loss.backward()
    assert h.grad is None
    assert w.grad is None


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_cross_entropy_equals_autograd(num_tokens: int) -> None:
    h, w = random(num_tokens, SIZE, seed=0).requires_grad_(), head(1).requires_grad_()
    loss = cross_entropy(h, w, targets(num_tokens))
    h64, w64 = doubles(h, w)
    reference = F.cross_entropy(h64 @ w64.t(), targets(num_tokens))
    assert_close(loss, reference)
    (0.5 * loss).backward()
    (0.5 * reference).backward()
    for ours, theirs in ((h, h64), (w, w64)):
        assert theirs.grad is not None
        assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", ["h", "w"])
def test_a_frozen_side_changes_nothing_for_the_other(frozen: str) -> None:
    tensors = {"h": random(CHUNK_TOKENS + 1, SIZE, seed=0), "w": head(1)}
    (free,) = tensors.keys() - {frozen}
    tensors[free].requires_grad_()
    cross_entropy(tensors["h"], tensors["w"], targets(CHUNK_TOKENS + 1)).backward()
    reference = dict(zip("hw", doubles(tensors["h"], tensors["w"]), strict=True))
    F.cross_entropy(reference["h"] @ reference["w"].t(), targets(CHUNK_TOKENS + 1)).backward()
    expected = reference[free].grad
    assert expected is not None
    assert_close(tensors[free].grad, expected)
    assert tensors[frozen].grad is None


def test_a_second_backward_gives_the_same_gradient() -> None:
    h, w = random(5, SIZE, seed=0).requires_grad_(), head(1).requires_grad_()
    loss = cross_entropy(h, w, targets(5))
    first = torch.autograd.grad(2 * loss, [h, w], retain_graph=True)
    again = torch.autograd.grad(2 * loss, [h, w])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_lowered_hidden_states_meet_the_head_in_their_own_type() -> None:
    h, w = random(9, SIZE, seed=0), head(1).requires_grad_()
    low = h.bfloat16().requires_grad_()
    loss = cross_entropy(low, w, targets(9))
    reference = F.cross_entropy(h @ w.detach().t(), targets(9))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), reference, rtol=2e-2, atol=0)
    loss.backward()
    assert low.grad is not None
    assert w.grad is not None
    assert (low.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_token_losses_equal_those_of_the_whole_logits(num_tokens: int) -> None:
    h, w = random(num_tokens, SIZE, seed=0), head(1)
    reference = F.cross_entropy(h.double() @ w.double().t(), targets(num_tokens), reduction="none")
    assert_close(token_losses(h, w, targets(num_tokens)), reference)


def mean_kl(h: Tensor, e: Tensor, w: Tensor) -> float:
    """Of the predictions after moving all hidden states by `e`, from those before."""
    before, after = F.log_softmax(h @ w.t(), -1), F.log_softmax((h + e) @ w.t(), -1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_head_metric_predicts_the_divergence_of_small_moves() -> None:
    # equal tokens: then the mean prediction is each token's own
    h, w, e = random(1, SIZE, seed=0).expand(CHUNK_TOKENS + 5, -1), head(1), random(SIZE, seed=4)
    metric = head_metric(h, w)
    errors = []
    for scale in (0.3, 0.1, 0.01):
        move = (scale * e).double()
        predicted = 0.5 * float(move @ metric.double() @ move)
        errors.append(abs(predicted / mean_kl(h.double(), move, w.double()) - 1))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02


def test_head_metric_is_the_curvature_at_the_mean_prediction() -> None:
    h, w = random(CHUNK_TOKENS + 5, SIZE, seed=0), head(1)
    p = F.softmax(h.double() @ w.double().t(), -1).mean(0)

    def divergence(e: Tensor) -> Tensor:
        """From the mean prediction to itself with its logits moved by the head's image of `e`."""
        return (p * (p.log() - F.log_softmax(p.log() + w.double() @ e, -1))).sum()

    hessian = torch.autograd.functional.hessian(divergence, torch.zeros(SIZE, dtype=torch.float64))
    assert_close(head_metric(h, w), hessian)


def softened(h: Tensor, w: Tensor, cap: float) -> Tensor:
    """Logits as Gemma 2 has them."""
    return torch.tanh(h @ w.t() / cap) * cap


@pytest.mark.parametrize("cap", [0.5, 3.0])
def test_losses_of_capped_logits_equal_autograd(cap: float) -> None:
    n = CHUNK_TOKENS + 7
    h, w, other_h = random(n, SIZE, seed=0).requires_grad_(), head(1).requires_grad_(), random(n, SIZE, seed=2)
    weights = random(n, seed=3).abs()
    h64, w64, other64 = doubles(h, w, other_h)
    logits = softened(h64, w64, cap)
    teacher = F.log_softmax(softened(other64, w64, cap).detach() / 2, -1)
    each = F.cross_entropy(logits, targets(n), reduction="none")
    divergence = (teacher.exp() * (teacher - F.log_softmax(logits / 2, -1))).sum(-1).mean() * 4
    for ours, reference in (
        (cross_entropy(h, w, targets(n), cap), each.mean()),
        (forward_kl(h, w, other_h, w, 2.0, cap), divergence),
    ):
        assert_close(ours, reference)
        expected = torch.autograd.grad(reference, (h64, w64), retain_graph=True)
        for mine, theirs in zip(torch.autograd.grad(ours, (h, w)), expected, strict=True):
            assert_close(mine, theirs)
    summed = summed_cross_entropy(h.detach(), w.detach(), targets(n), weights, cap)
    total = (each * weights.double()).sum()
    assert_close(summed.total, total)
    assert_close(summed.gradient_ND, torch.autograd.grad(total, h64)[0])
    assert_close(scored(h.detach(), w.detach(), targets(n), weights, cap)[0], total)
    assert_close(token_losses(h, w, targets(n), cap), each)
    assert_close(-token_scores(h, w, targets(n), cap)[0], each)
    assert_close(capped(h.detach() @ w.detach().t(), cap), logits)

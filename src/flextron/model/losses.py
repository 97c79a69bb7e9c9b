"""Losses over the vocabulary that never hold the logits of more than a chunk of tokens.

The head is where training on a CPU spends its memory traffic: 1,024 tokens over 49,152 words are 200 MB a tensor, and
the plain route makes nine such tensors. Here each chunk's logits live for a moment, and the gradients by hidden states
and head weight are computed in the forward pass, from the closed form p_student - p_target.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "SummedLoss",
    "capped",
    "cross_entropy",
    "forward_kl",
    "head_metric",
    "scored",
    "summed_cross_entropy",
    "token_losses",
    "token_scores",
]

CHUNK_TOKENS = 256


def capped(x: Tensor, cap: float | None) -> Tensor:
    """Cap · tanh(x / cap), which x is for small numbers (Gemma 2); x itself without a cap."""
    return x if cap is None else (x / cap).tanh_().mul_(cap) if not x.requires_grad else (x / cap).tanh() * cap


def _slope(capped_x: Tensor, cap: float) -> Tensor:
    """The derivative of `capped`, from what it gave."""
    return 1 - (capped_x / cap).square_()


def _chunks(num_tokens: int) -> Iterator[slice]:
    return (slice(a, min(a + CHUNK_TOKENS, num_tokens)) for a in range(0, num_tokens, CHUNK_TOKENS))


class _Vocabulary(torch.autograd.Function):
    """Shared frame: per chunk, a loss and the gradient of its logits; then what both losses do with that gradient."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, chunk_loss: Any, cap: float | None) -> Tensor:
        need_h, need_w, *_ = ctx.needs_input_grad
        dh = torch.empty_like(h_ND) if need_h else None
        dw = torch.zeros_like(w_VD) if need_w else None
        total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
        for rows in _chunks(len(h_ND)):
            logits_NV = capped((h_ND[rows] @ w_VD.t()).float(), cap)
            # taken first: losses compute in place
            slope_NV = None if cap is None else _slope(logits_NV, cap)
            loss, g_NV = chunk_loss(rows, logits_NV)
            total += loss
            g_NV = (g_NV if slope_NV is None else g_NV.mul_(slope_NV)).div_(len(h_ND)).to(h_ND.dtype)
            if dh is not None:
                torch.mm(g_NV, w_VD, out=dh[rows])
            if dw is not None:
                dw.addmm_(g_NV.t(), h_ND[rows])
        ctx.save_for_backward(dh, dw)
        return (total / len(h_ND)).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dh, dw = ctx.saved_tensors
        (scale,) = grads
        # the caller may hold the saved tensors for a second backward: scale copies, not them
        return dh if dh is None else dh * scale, dw if dw is None else dw * scale, None, None


def _matched(h_ND: Tensor, w_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Head weight in the hidden states' dtype, which autocast may have lowered."""
    return h_ND, w_VD.to(h_ND.dtype)


def forward_kl(
    h_ND: Tensor,
    w_VD: Tensor,
    teacher_h_ND: Tensor,
    teacher_w_VD: Tensor,
    temperature: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), times temperature squared.

    Args:
        h_ND: the student's final hidden states.
        w_VD: the student's head.
        teacher_h_ND: the teacher's final hidden states; no gradient flows to them.
        teacher_w_VD: the teacher's head; no gradient flows to it.
        temperature: divides both logits.
        cap: cap of both logits, before the temperature; see `capped`.

    Returns:
        A scalar, float32, in nats.
    """
    teacher_h, teacher_w = _matched(teacher_h_ND.detach(), teacher_w_VD.detach())

    def chunk_loss(rows: slice, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_NV = torch.log_softmax(capped((teacher_h[rows] @ teacher_w.t()).float(), cap).div_(temperature), -1)
        student_NV = torch.log_softmax(student_NV.div_(temperature), -1)
        p_teacher = teacher_NV.exp()
        loss = torch.dot(p_teacher.flatten(), teacher_NV.sub_(student_NV).flatten()) * temperature**2
        return loss, student_NV.exp_().sub_(p_teacher).mul_(temperature)

    return _Vocabulary.apply(*_matched(h_ND, w_VD), chunk_loss, cap)  # type: ignore[no-untyped-call,no-any-return]


def cross_entropy(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the targets.

    Args:
        h_ND: final hidden states.
        w_VD: the head.
        targets_N: token ids, int64.
        cap: cap of the logits; see `capped`.

    Returns:
        A scalar, float32, in nats.
    """

    def chunk_loss(rows: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits_NV, -1)
        target = targets_N[rows, None]
        loss = -log_p.gather(1, target).sum()
        g = log_p.exp_()
        return loss, g.scatter_add_(1, target, torch.full_like(target, -1, dtype=g.dtype))

    return _Vocabulary.apply(*_matched(h_ND, w_VD), chunk_loss, cap)  # type: ignore[no-untyped-call,no-any-return]


class SummedLoss(NamedTuple):
    """Result of `summed_cross_entropy`."""

    total: Tensor
    """Weighted sum of the targets' negative log-likelihoods, a scalar, float64, in nats."""
    gradient_ND: Tensor
    """Gradient of the sum with respect to the hidden states."""
    num_right: int
    """Targets that were the likeliest token."""


@torch.no_grad()
def summed_cross_entropy(
    h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, weights_N: Tensor, cap: float | None = None
) -> SummedLoss:
    """Weighted cross-entropy and its gradient; the softmax in float32 at least.

    The gradient is (p - onehot) W: the product with the probabilities, and a row of W for each target, so that nothing
    but the softmax itself goes over the vocabulary once more.

    Args:
        h_ND: final hidden states.
        w_VD: the head.
        targets_N: token ids, int64.
        weights_N: what each token counts.
        cap: cap of the logits; see `capped`.
    """
    dtype = torch.promote_types(h_ND.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
    gradient_ND = torch.empty_like(h_ND)
    right = torch.zeros((), dtype=torch.long, device=h_ND.device)
    for rows in _chunks(len(h_ND)):
        target, weight = targets_N[rows], weights_N[rows].to(dtype)
        logits_NV = capped((h_ND[rows] @ w_VD.t()).to(dtype), cap)
        most, likeliest = logits_NV.max(-1)
        own = logits_NV.gather(1, target[:, None])[:, 0]
        p_NV = torch.softmax(logits_NV, -1)
        # the largest probability is never too small for a logarithm
        log_sum = most - p_NV.gather(1, likeliest[:, None])[:, 0].log()
        total += ((log_sum - own) * weight).sum()
        right += (likeliest == target).sum()
        own_slope = None
        if cap is not None:
            p_NV, own_slope = p_NV.mul_(_slope(logits_NV, cap)), _slope(own, cap)[:, None].to(h_ND.dtype)
        torch.mm(p_NV.to(h_ND.dtype), w_VD, out=gradient_ND[rows])
        own_ND = w_VD[target] if own_slope is None else w_VD[target] * own_slope
        gradient_ND[rows] = (gradient_ND[rows] - own_ND) * weight[:, None].to(h_ND.dtype)
    return SummedLoss(total, gradient_ND, int(right))


@torch.no_grad()
def scored(
    h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, weights_N: Tensor, cap: float | None = None
) -> tuple[Tensor, int]:
    """What `summed_cross_entropy` gives but for the gradient: the sum, float64, and how many tokens are right."""
    dtype = torch.promote_types(h_ND.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
    right = torch.zeros((), dtype=torch.long, device=h_ND.device)
    for rows in _chunks(len(h_ND)):
        logits_NV, target = capped((h_ND[rows] @ w_VD.t()).to(dtype), cap), targets_N[rows]
        total += (F.cross_entropy(logits_NV, target, reduction="none") * weights_N[rows].to(dtype)).sum()
        right += (logits_NV.argmax(-1) == target).sum()
    return total, int(right)


@torch.no_grad()
def token_losses(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float | None = None) -> Tensor:
    """Negative log-likelihood of each target, (N,), float32, in nats; for evaluation."""
    h, w = _matched(h_ND, w_VD)
    logits = ((capped((h[r] @ w.t()).float(), cap), targets_N[r]) for r in _chunks(len(h)))
    return torch.cat([F.cross_entropy(logits_NV, target, reduction="none") for logits_NV, target in logits])


@torch.no_grad()
def token_scores(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """What an evaluation asks of each target.

    Args:
        h_ND: final hidden states.
        w_VD: the head.
        targets_N: token ids, int64.
        cap: cap of the logits; see `capped`.

    Returns:
        Log-likelihoods, (N,), float32, in nats.
        Whether each is the likeliest token, (N,), bool.
    """
    h, w = _matched(h_ND, w_VD)
    log_p, is_likeliest = [], []
    for rows in _chunks(len(h)):
        logits_NV, target = capped((h[rows] @ w.t()).float(), cap), targets_N[rows]
        log_p.append(-F.cross_entropy(logits_NV, target, reduction="none"))
        is_likeliest.append(logits_NV.argmax(-1) == target)
    return torch.cat(log_p), torch.cat(is_likeliest)


@torch.no_grad()
def head_metric(h_ND: Tensor, w_VD: Tensor, cap: float | None = None) -> Tensor:
    """How much a change of the final hidden state changes the prediction: a (D, D) quadratic form.

    For a small change e of a hidden state that predicts p, KL ≈ ½ eᵀ G e with G = Wᵀ (diag(p) - p pᵀ) W. Here p is the
    mean prediction of sample tokens (which bounds the mean of their G from above), so that one matrix serves all; a
    distance over the whole vocabulary costs D² a token, not D · V. A cap of the logits enters p alone; without its
    slope G is bounded from above once more.

    Args:
        h_ND: final hidden states of sample tokens.
        w_VD: the head.
        cap: cap of the logits; see `capped`.

    Returns:
        (D, D), float32.
    """
    logits = (capped((h_ND[rows] @ w_VD.t()).float(), cap) for rows in _chunks(len(h_ND)))
    p = sum(torch.softmax(logits_NV, -1).sum(0) for logits_NV in logits) / len(h_ND)
    assert isinstance(p, Tensor)
    w = w_VD.float()
    mean = p @ w
    return (w * p[:, None]).t() @ w - torch.outer(mean, mean)

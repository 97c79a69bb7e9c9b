"""Losses over the vocabulary that never hold the logits of more than a chunk of tokens.

The head is where training on a CPU spends its memory traffic: 1,024 tokens over 49,152 words are 200 MB a tensor, and
the plain route makes nine such tensors. Here each chunk's logits live for a moment, and the gradients by hidden states
and head weight are computed in the forward pass, from the closed form p_student - p_target.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextron.model.decoder import capped

__all__ = [
    "ChunkLosses",
    "SummedLoss",
    "VocabularyLosses",
    "chunk_losses",
    "chunks",
    "cross_entropy",
    "forward_kl",
    "head_metric",
    "matched",
    "summed_cross_entropy",
    "vocabulary_losses",
]

CHUNK_TOKENS = 256


def _slope(capped_x: Tensor, cap: float) -> Tensor:
    """The derivative of `capped`, from what it gave."""
    return 1 - (capped_x / cap).square_()


def chunks(num_tokens: int) -> Iterator[slice]:
    """Rows of tokens whose logits may live together."""
    return (slice(a, min(a + CHUNK_TOKENS, num_tokens)) for a in range(0, num_tokens, CHUNK_TOKENS))


class ChunkLosses(NamedTuple):
    """What `chunk_losses` gives."""

    kl: Tensor
    """Sum over the tokens, a scalar, in nats; 0 without a teacher."""
    lm: Tensor
    """Sum over the tokens that have a target, a scalar, in nats."""
    gradient_NV: Tensor
    """Gradient of the scaled losses by the student's logits."""


def chunk_losses(
    logits_NV: Tensor,
    teacher_NV: Tensor | None,
    targets_N: Tensor | None,
    *,
    scales: tuple[float, float | Tensor],
    temperature: float,
    cap: float | None,
) -> ChunkLosses:
    """Both losses of a few tokens, and their gradient.

    Args:
        logits_NV: the student's, before the cap; may be overwritten.
        teacher_NV: the teacher's; None without the KL.
        targets_N: next tokens, -1 where there is none; None without the next-token loss.
        scales: what a token's KL and next-token loss count in the gradient.
        temperature: divides both logits of the KL, which is multiplied by its square.
        cap: of all logits; see `capped`.
    """
    student_NV = capped(logits_NV.float(), cap)
    log_p = torch.log_softmax(student_NV, -1)
    kl = lm = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
    gradient_NV = torch.zeros_like(student_NV)
    if teacher_NV is not None:
        log_t = torch.log_softmax(capped(teacher_NV.float(), cap).div_(temperature), -1)
        log_s = log_p if temperature == 1 else torch.log_softmax(student_NV / temperature, -1)
        kl = (log_t.exp() * (log_t - log_s)).sum() * temperature**2
        gradient_NV += (log_s.exp() - log_t.exp()).mul_(temperature * scales[0])
    if targets_N is not None:
        known_N1 = (targets_N >= 0)[:, None]
        target_N1 = targets_N.clamp(min=0)[:, None]
        lm = -(log_p.gather(1, target_N1) * known_N1).sum()
        p = log_p.exp().scatter_add_(1, target_N1, torch.full_like(target_N1, -1, dtype=log_p.dtype))
        gradient_NV += p.mul_(known_N1).mul_(scales[1])
    if cap is not None:
        gradient_NV *= _slope(student_NV, cap)
    return ChunkLosses(kl=kl, lm=lm, gradient_NV=gradient_NV)


class _Vocabulary(torch.autograd.Function):
    """Per chunk, the losses and the gradient of the logits; then that of the hidden states and of the head."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, chunk_loss: Callable[[slice, Tensor], ChunkLosses]) -> Any:
        need_h, need_w, *_ = ctx.needs_input_grad
        dh = torch.empty_like(h_ND) if need_h else None
        dw = torch.zeros_like(w_VD) if need_w else None
        kl, lm = torch.zeros(2, dtype=torch.float64, device=h_ND.device)
        for rows in chunks(len(h_ND)):
            losses = chunk_loss(rows, h_ND[rows] @ w_VD.t())
            kl, lm = kl + losses.kl, lm + losses.lm
            g_NV = losses.gradient_NV.to(h_ND.dtype)
            if dh is not None:
                torch.mm(g_NV, w_VD, out=dh[rows])
            if dw is not None:
                dw.addmm_(g_NV.t(), h_ND[rows])
        ctx.save_for_backward(dh, dw)
        ctx.mark_non_differentiable(kl, lm)
        # what the gradient is of: its value is put together by the caller
        return h_ND.new_zeros((), dtype=torch.float32), kl, lm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dh, dw = ctx.saved_tensors
        scale, *_ = grads
        # the caller may hold the saved tensors for a second backward: scale copies, not them
        return dh if dh is None else dh * scale, dw if dw is None else dw * scale, None


def matched(h_ND: Tensor, w_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Head weight in the hidden states' dtype, which autocast may have lowered."""
    return h_ND, w_VD.to(h_ND.dtype)


class VocabularyLosses(NamedTuple):
    """Result of `vocabulary_losses`; scalars, float32, in nats."""

    total: Tensor
    """The weighted sum, with gradients."""
    kl: Tensor
    """Mean over the tokens of KL(teacher ‖ student), times temperature squared."""
    lm: Tensor
    """Mean negative log-likelihood over the tokens that have a target."""


def vocabulary_losses(
    h_ND: Tensor,
    w_VD: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    targets_N: Tensor | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    temperature: float = 1.0,
    cap: float | None = None,
    chunk: Callable[..., ChunkLosses] = chunk_losses,
    totals: tuple[int, int] | None = None,
) -> VocabularyLosses:
    """Distance to a teacher and next-token loss, from one product with the head.

    Args:
        h_ND: the student's final hidden states.
        w_VD: the student's head.
        teacher: its final hidden states, (N, D'), and its head, (V, D'); no gradient flows to them. None: no KL.
        targets_N: next tokens, int64, -1 where there is none. None: no next-token loss.
        weights: of both losses in the total.
        temperature: see `chunk_losses`.
        cap: see `capped`.
        chunk: `chunk_losses`, or what does the same.
        totals: tokens and targets over which the means are taken, where these are but a part of them; there may then
            be none at all.
    """
    theirs = None if teacher is None else matched(*(t.detach() for t in teacher))
    num_targets: float | Tensor = 1 if targets_N is None else (targets_N >= 0).sum().clamp(min=1)
    num_tokens, num_targets = (len(h_ND), num_targets) if totals is None else totals
    scales = (weights[0] / num_tokens, weights[1] / num_targets)

    def chunk_loss(rows: slice, logits_NV: Tensor) -> ChunkLosses:
        teacher_NV = None if theirs is None else theirs[0][rows] @ theirs[1].t()
        targets = None if targets_N is None else targets_N[rows]
        return chunk(logits_NV, teacher_NV, targets, scales=scales, temperature=temperature, cap=cap)

    anchor, kl, lm = _Vocabulary.apply(*matched(h_ND, w_VD), chunk_loss)  # type: ignore[no-untyped-call]
    kl, lm = (kl / num_tokens).float(), (lm / num_targets).float()
    return VocabularyLosses(total=anchor + weights[0] * kl + weights[1] * lm, kl=kl, lm=lm)


def forward_kl(
    h_ND: Tensor,
    w_VD: Tensor,
    teacher_h_ND: Tensor,
    teacher_w_VD: Tensor,
    temperature: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), times temperature squared; arguments as for `vocabulary_losses`."""
    teacher = (teacher_h_ND, teacher_w_VD)
    return vocabulary_losses(h_ND, w_VD, teacher=teacher, temperature=temperature, cap=cap).total


def cross_entropy(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the targets; arguments as for `vocabulary_losses`."""
    return vocabulary_losses(h_ND, w_VD, targets_N=targets_N, cap=cap).total


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
    for rows in chunks(len(h_ND)):
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
    logits = (capped((h_ND[rows] @ w_VD.t()).float(), cap) for rows in chunks(len(h_ND)))
    p = sum(torch.softmax(logits_NV, -1).sum(0) for logits_NV in logits) / len(h_ND)
    assert isinstance(p, Tensor)
    w = w_VD.float()
    mean = p @ w
    return (w * p[:, None]).t() @ w - torch.outer(mean, mean)

"""How likely tokens are, without gradients: losses of single tokens, and counts of those that are the likeliest.

As in `losses`, no more logits live at a time than those of a chunk of tokens.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.losses.vocabulary import chunks, matched
from flextron.model.decoder import capped

__all__ = ["scored", "token_losses", "token_scores"]


@torch.no_grad()
def scored(
    h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, weights_N: Tensor, cap: float | None = None
) -> tuple[Tensor, int]:
    """What `summed_cross_entropy` gives but for the gradient: the sum, float64, and how many tokens are right."""
    dtype = torch.promote_types(h_ND.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
    right = torch.zeros((), dtype=torch.long, device=h_ND.device)
    for rows in chunks(len(h_ND)):
        logits_NV, target = capped((h_ND[rows] @ w_VD.t()).to(dtype), cap), targets_N[rows]
        total += (F.cross_entropy(logits_NV, target, reduction="none") * weights_N[rows].to(dtype)).sum()
        right += (logits_NV.argmax(-1) == target).sum()
    return total, int(right)


@torch.no_grad()
def token_losses(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float | None = None) -> Tensor:
    """Negative log-likelihood of each target, (N,), float32, in nats; for evaluation."""
    h, w = matched(h_ND, w_VD)
    logits = ((capped((h[r] @ w.t()).float(), cap), targets_N[r]) for r in chunks(len(h)))
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
    h, w = matched(h_ND, w_VD)
    log_p, is_likeliest = [], []
    for rows in chunks(len(h)):
        logits_NV, target = capped((h[rows] @ w.t()).float(), cap), targets_N[rows]
        log_p.append(-F.cross_entropy(logits_NV, target, reduction="none"))
        is_likeliest.append(logits_NV.argmax(-1) == target)
    return torch.cat(log_p), torch.cat(is_likeliest)

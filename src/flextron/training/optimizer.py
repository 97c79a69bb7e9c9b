"""Which parameters elastic training changes, and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flextron.elastic.adapter import norm_parameters
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.training.recipe import TrainRecipe

__all__ = ["choose_trained", "learning_rate", "make_optimizer"]


def learning_rate(recipe: TrainRecipe, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio`."""
    warmup = max(1, round(recipe.warmup_fraction * num_steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = recipe.min_lr_ratio
    return recipe.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def choose_trained(decoder: Decoder, adapter: Adapter | None, recipe: TrainRecipe) -> list[nn.Parameter]:
    """What trains: all but embeddings and head, or beside an adapter the norms alone."""
    if adapter is not None:
        decoder.requires_grad_(False)
        trained = [*adapter.parameters(), *norm_parameters(decoder).values()]
        for p in trained:
            p.requires_grad_()
        return trained
    frozen = () if recipe.train_embeddings else ("embedding.", "positions.", "head.")
    for name, p in decoder.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
    return [p for p in decoder.parameters() if p.requires_grad]


def make_optimizer(
    trained: Sequence[nn.Parameter], recipe: TrainRecipe, router: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over what trains: matrices with decay, vectors without; and over a router that trains along."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    if router is not None:
        scale = recipe.router_lr / recipe.lr
        groups.append({"params": list(router.parameters()), "weight_decay": 0.0, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)

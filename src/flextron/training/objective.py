"""The distillation loss of one micro batch, as a module, so that whatever wraps modules (DDP) sees all of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.kernels.elementwise import chunk_losses_compiled
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.losses import head_metric, vocabulary_losses
from flextron.training.recipe import TrainRecipe

__all__ = ["Objective", "Taught", "Teacher"]


class Taught(NamedTuple):
    """What the teacher says of a micro batch."""

    h_ND: Tensor
    """Final hidden states."""
    head_weight: Tensor
    """(V, D)."""
    metric_DD: Tensor
    """See `flextron.model.losses.head_metric`."""


class Teacher:
    """The frozen original: its final hidden states, its head, and the metric that its head gives hidden states."""

    def __init__(self, decoder: Decoder, sample_BT: Tensor) -> None:
        """Freeze a teacher.

        Args:
            decoder: used as it is; not copied.
            sample_BT: tokens on which the head's metric is averaged.
        """
        self._decoder = decoder.eval().requires_grad_(False)
        self._metric_DD = head_metric(
            self._hidden(sample_BT.to(decoder.device)), decoder.head_weight, decoder.config.logits_cap
        )

    def __call__(self, tokens_BT: Tensor, repeats: int = 1) -> Taught:
        """What it says of sequences that the batch holds `repeats` times, one round after the other."""
        h_ND = self._hidden(tokens_BT).repeat(repeats, 1)
        return Taught(h_ND=h_ND, head_weight=self._decoder.head_weight, metric_DD=self._metric_DD)

    @torch.no_grad()
    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states, (N, D)."""
        return self._decoder(Batch.padded(tokens_BT, self._decoder.widths))  # type: ignore[no-any-return]


class Objective(nn.Module):
    """Student in, losses out."""

    def __init__(self, student: Decoder, recipe: TrainRecipe, adapter: Adapter | None = None) -> None:
        """Wrap the student, whose parameters are the module's, and those of the adapter that its batches carry."""
        super().__init__()
        self.student, self.adapter = student, adapter
        self._recipe, self._cap = recipe, student.config.logits_cap

    def forward(self, batch: Batch, taught: Taught | None, rows: Tensor) -> dict[str, Tensor]:
        """Losses of a micro batch, each a scalar; `loss` is their weighted sum.

        Args:
            batch: padded sequences, dealt to sub-networks.
            taught: what the teacher says of them; None where the recipe needs none.
            rows: indices of the tokens on which the vocabulary's losses are computed.

        Raises:
            FlextronError: the recipe compares with a teacher, and there is none.
        """
        recipe = self._recipe
        if recipe.needs_teacher and taught is None:
            raise FlextronError("kl_weight or hidden_weight is above 0, but there is no teacher; give one")
        h_ND = self.student(batch)
        losses: dict[str, Tensor] = {"loss": h_ND.new_zeros((), dtype=torch.float32)}
        if recipe.kl_weight or recipe.lm_weight:
            found = vocabulary_losses(
                h_ND[rows],
                self.student.head_weight,
                teacher=(taught.h_ND[rows], taught.head_weight) if taught is not None and recipe.kl_weight else None,
                targets_N=_next_tokens(batch, rows) if recipe.lm_weight else None,
                weights=(recipe.kl_weight, recipe.lm_weight),
                temperature=recipe.temperature,
                cap=self._cap,
                chunk=chunk_losses_compiled,
            )
            losses["loss"] = losses["loss"] + found.total
            losses |= {"kl": found.kl} if recipe.kl_weight else {}
            losses |= {"lm": found.lm} if recipe.lm_weight else {}
        if taught is not None and recipe.hidden_weight:
            error = h_ND.float() - taught.h_ND.float()
            losses["hidden"] = 0.5 * ((error @ taught.metric_DD) * error).sum(-1).mean()
            losses["loss"] = losses["loss"] + recipe.hidden_weight * losses["hidden"]
        return losses


def _next_tokens(batch: Batch, rows: Tensor) -> Tensor:
    """What follows each of the tokens; -1 after the last one of a sequence, which has no next one in the batch."""
    following = batch.tokens_N.roll(-1)[rows]
    return following.masked_fill(batch.positions_N[rows] == batch.positions_N.max(), -1)

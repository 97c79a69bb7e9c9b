"""The distillation loss as a module, with the teacher in it, so that what shards modules sees all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.kernels.elementwise import chunk_losses_compiled
from flextron.losses.vocabulary import head_metric, vocabulary_losses
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.training.recipe import TrainRecipe

__all__ = ["Distillation", "Objective", "Taught", "Teacher", "Totals"]


class Totals(NamedTuple):
    """What sums are divided by, so that they become means over more than one batch."""

    tokens: int
    rows: int
    """Tokens whose vocabulary losses are computed."""
    targets: int
    """Those of them that a next token follows."""


class Taught(NamedTuple):
    """What the teacher says of a micro batch."""

    h_ND: Tensor
    """Final hidden states."""
    head_weight: Tensor
    """(V, D)."""
    metric_DD: Tensor
    """See `flextron.losses.vocabulary.head_metric`."""


class Teacher(nn.Module):
    """The frozen original: its final hidden states, its head, and the metric that its head gives hidden states."""

    def __init__(
        self,
        decoder: Decoder,
        sample_BT: Tensor,
        agreed: Callable[[Callable[[], Tensor]], Tensor] = lambda measure: measure(),
    ) -> None:
        """Freeze a teacher.

        Args:
            decoder: used as it is; not copied.
            sample_BT: tokens on which the head's metric is averaged.
            agreed: calls the function that measures the metric, or brings what another process measured.
        """
        super().__init__()
        self.decoder = decoder.eval().requires_grad_(False)

        def measure() -> Tensor:
            hidden_ND = self._hidden(sample_BT.to(decoder.device))
            return head_metric(hidden_ND, decoder.head_weight, decoder.config.logits_cap)

        self.metric_DD = agreed(measure)

    def forward(self, tokens_BT: Tensor, repeats: int = 1) -> Taught:
        """What it says of sequences that the batch holds `repeats` times, one round after the other."""
        h_ND = self._hidden(tokens_BT).repeat(repeats, 1)
        return Taught(h_ND=h_ND, head_weight=self.decoder.head_weight, metric_DD=self.metric_DD)

    @torch.no_grad()
    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states, (N, D)."""
        return self.decoder(Batch.padded(tokens_BT, self.decoder.widths))  # type: ignore[no-any-return]


class Objective(nn.Module):
    """Student in, losses out."""

    def __init__(self, student: Decoder, recipe: TrainRecipe, adapter: Adapter | None = None) -> None:
        """Wrap the student, whose parameters are the module's, and those of the adapter that its batches carry."""
        super().__init__()
        self.student, self.adapter = student, adapter
        self._recipe, self._cap = recipe, student.config.logits_cap

    def forward(
        self, batch: Batch, taught: Taught | None, rows: Tensor, totals: Totals | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch, each a scalar; `loss` is their weighted sum.

        Args:
            batch: padded sequences, dealt to sub-networks.
            taught: what the teacher says of them; None where the recipe needs none.
            rows: indices of the tokens on which the vocabulary's losses are computed.
            totals: those of a whole of which the batch is a part; the losses are then terms of the whole's. By default
                the batch is the whole.

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
                totals=None if totals is None else (totals.rows, totals.targets),
            )
            losses["loss"] = losses["loss"] + found.total
            losses |= {"kl": found.kl} if recipe.kl_weight else {}
            losses |= {"lm": found.lm} if recipe.lm_weight else {}
        if taught is not None and recipe.hidden_weight:
            error = h_ND.float() - taught.h_ND.float()
            total = 0.5 * ((error @ taught.metric_DD) * error).sum()
            losses["hidden"] = total / (len(error) if totals is None else totals.tokens)
            losses["loss"] = losses["loss"] + recipe.hidden_weight * losses["hidden"]
        return losses


class Distillation(nn.Module):
    """Teacher, then student, of the same sequences."""

    def __init__(self, objective: Objective, teacher: Teacher | None) -> None:
        """Put the two together; without a teacher the text alone teaches."""
        super().__init__()
        self.objective, self.teacher = objective, teacher

    def forward(self, tokens_BT: Tensor, repeats: int, batch: Batch, rows: Tensor, totals: Totals) -> dict[str, Tensor]:
        """Losses of the batch; see `Objective`.

        Args:
            tokens_BT: its sequences, each once.
            repeats: how often the batch holds them, one round after the other.
            batch: see `Objective`.
            rows: see `Objective`.
            totals: see `Objective`.
        """
        taught = None if self.teacher is None else self.teacher(tokens_BT, repeats)
        return self.objective(batch, taught, rows, totals)  # type: ignore[no-any-return]


def _next_tokens(batch: Batch, rows: Tensor) -> Tensor:
    """What follows each of the tokens; -1 after the last one of a sequence, which has no next one in the batch."""
    following = batch.tokens_N.roll(-1)[rows]
    return following.masked_fill(batch.positions_N[rows] == batch.positions_N.max(), -1)

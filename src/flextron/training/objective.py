"""The distillation loss of one micro batch, as a module, so that whatever wraps modules (DDP) sees all of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.losses import cross_entropy, forward_kl, head_metric
from flextron.training.recipe import TrainRecipe

__all__ = ["Objective", "TeacherStates"]


class TeacherStates:
    """The frozen original: its final hidden states, its head, and the metric that its head gives hidden states."""

    def __init__(self, decoder: Decoder, sample_BT: Tensor) -> None:
        """Freeze a teacher.

        Args:
            decoder: used as it is; not copied.
            sample_BT: tokens on which the head's metric is averaged.
        """
        self._decoder = decoder.eval().requires_grad_(False)
        self.head_weight = decoder.head_weight
        hidden_ND = self.hidden(sample_BT.to(decoder.device))
        self.metric_DD = head_metric(hidden_ND, decoder.head_weight, decoder.config.logits_cap)

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states, (N, D)."""
        return self._decoder(Batch.padded(tokens_BT, self._decoder.widths))  # type: ignore[no-any-return]


class Objective(nn.Module):
    """Student in, losses out."""

    def __init__(self, student: Decoder, recipe: TrainRecipe, adapter: Adapter | None = None) -> None:
        """Wrap the student, whose parameters are the module's, and those of the adapter that its batches carry."""
        super().__init__()
        self.student, self.adapter = student, adapter
        self._recipe, self._cap = recipe, student.config.logits_cap

    def forward(
        self, batch: Batch, teacher: TeacherStates | None, teacher_h_ND: Tensor | None, rows: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a micro batch, each a scalar; `loss` is their weighted sum.

        Args:
            batch: padded sequences, dealt to sub-networks.
            teacher: head and metric; None where the recipe needs none.
            teacher_h_ND: its final hidden states on the same tokens; None with it.
            rows: indices of the tokens on which the vocabulary's losses are computed.

        Raises:
            FlextronError: the recipe compares with a teacher, and there is none.
        """
        recipe = self._recipe
        h_ND = self.student(batch)
        losses: dict[str, Tensor] = {}
        if recipe.needs_teacher:
            if teacher is None or teacher_h_ND is None:
                raise FlextronError("kl_weight or hidden_weight is above 0, but there is no teacher; give one")
            losses |= self._distances(h_ND, teacher, teacher_h_ND, rows)
        if recipe.lm_weight:
            # the last token of a sequence has no next one in the batch
            inner = rows[batch.positions_N[rows] < batch.positions_N.max()]
            if len(inner):
                losses["lm"] = cross_entropy(
                    h_ND[inner], self.student.head_weight, batch.tokens_N[inner + 1], self._cap
                )
        weights = {"kl": recipe.kl_weight, "hidden": recipe.hidden_weight, "lm": recipe.lm_weight}
        losses["loss"] = sum((weights[name] * value for name, value in losses.items()), h_ND.new_zeros(()))
        return losses

    def _distances(self, h_ND: Tensor, teacher: TeacherStates, teacher_h_ND: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """What the student is away from the teacher."""
        recipe = self._recipe
        losses: dict[str, Tensor] = {}
        if recipe.kl_weight:
            losses["kl"] = forward_kl(
                h_ND[rows],
                self.student.head_weight,
                teacher_h_ND[rows],
                teacher.head_weight,
                recipe.temperature,
                self._cap,
            )
        if recipe.hidden_weight:
            error = h_ND.float() - teacher_h_ND.float()
            losses["hidden"] = 0.5 * ((error @ teacher.metric_DD) * error).sum(-1).mean()
        return losses

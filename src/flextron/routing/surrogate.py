"""The surrogate: a small network that predicts a sub-network's loss from the routers' choices alone (Flextron, 3.3).

Gradients that reach routers through a frozen language model are noisy and expensive. Through this one they cost
nothing. It sees the choices, how far each moves the residual stream (the root of its cost in `Sensitivity`), and, as a
prior, the three sums of the additive loss model; it predicts the logarithm of the rise over the full network's loss, so
that an error counts alike at every size. It is linear in these: with a hidden layer it fits a few hundred measurements
to the last digit, and ranks unseen networks worse.

Shapes: B sub-networks, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flextron.routing.routers import Choices
from flextron.routing.sensitivity import Sensitivity
from flextron.spec import SearchSpace

__all__ = ["Surrogate", "spearman"]

_FLOOR = 0.05
"""Nats added to rises before the logarithm, for the full network's is 0."""
_AMPLITUDE_SCALE, _CHOICE_SCALE = 6.0, 0.1
"""How readily the fit explains a rise by amplitudes, and by single choices."""


class Surrogate(nn.Module):
    """Choices in, logarithm of the loss's rise out."""

    _mlp_LW: Tensor
    _attention_LG: Tensor
    _skip_L2: Tensor

    def __init__(self, space: SearchSpace, sensitivity: Sensitivity) -> None:
        """Allocate.

        Args:
            space: the choices.
            sensitivity: the prior's terms.
        """
        super().__init__()
        num_layers = space.num_hidden_layers
        num_choices = num_layers * (len(space.intermediate_sizes) + len(space.num_groups) + 1)
        self.register_buffer("_mlp_LW", _costs(sensitivity.mlp, space.intermediate_sizes))
        self.register_buffer("_attention_LG", _costs(sensitivity.attention, space.num_groups))
        self.register_buffer(
            "_skip_L2",
            torch.tensor([[m[0], a[0]] for m, a in zip(sensitivity.mlp, sensitivity.attention, strict=True)]),
        )
        self.prior = nn.Linear(4, 1)
        self.amplitudes = nn.Linear(2 * num_layers, 1, bias=False)
        self.choices = nn.Linear(num_choices, 1, bias=False)
        with torch.no_grad():  # starts as the logarithm of the additive model
            self.prior.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
            for weight in (self.prior.bias, self.amplitudes.weight, self.choices.weight):
                weight.zero_()

    def forward(self, choices: Choices) -> Tensor:
        """Log of (rise in nats + 0.05), (B,), of choices that are (nearly) one-hot."""
        keep_BL = choices.keep_BL2[..., 0]
        mlp_BL = (choices.mlp_BLW * self._mlp_LW).sum(-1) * keep_BL
        attention_BL = (choices.attention_BLG * self._attention_LG).sum(-1) * keep_BL
        skipped_BL2 = self._skip_L2 * (1 - keep_BL)[..., None]
        mlp, attention, skipped = mlp_BL.sum(-1), attention_BL.sum(-1), skipped_BL2.sum((-1, -2))
        sums = torch.stack((mlp + attention + skipped, mlp, attention, skipped), -1)
        amplitudes_BL2 = (
            torch.stack(
                (
                    (choices.mlp_BLW * self._mlp_LW.sqrt()).sum(-1),
                    (choices.attention_BLG * self._attention_LG.sqrt()).sum(-1),
                ),
                -1,
            )
            * keep_BL[..., None]
            + self._skip_L2.sqrt() * (1 - keep_BL)[..., None]
        )
        predicted_B1: Tensor = (
            self.prior((sums + _FLOOR).log())
            + self.amplitudes(_AMPLITUDE_SCALE * amplitudes_BL2.flatten(-2))
            + self.choices(_CHOICE_SCALE * choices.features_BF)
        )
        return predicted_B1.squeeze(-1)

    @staticmethod
    def target(rise: Tensor) -> Tensor:
        """What `forward` should give for a measured rise in nats."""
        return (rise.clamp_min(0) + _FLOOR).log()

    @staticmethod
    def rise(predicted: Tensor) -> Tensor:
        """The inverse of `target`."""
        return predicted.exp() - _FLOOR


def _costs(tables: tuple[dict[int, float], ...], choices: tuple[int, ...]) -> Tensor:
    return torch.tensor([[table[c] for c in choices] for table in tables])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two samples, ties ranked by their mean."""

    def ranks(x: Tensor) -> Tensor:
        less = (x[:, None] > x[None, :]).sum(1).double()
        equal = (x[:, None] == x[None, :]).sum(1).double()
        return less + (equal - 1) / 2

    both = torch.stack((ranks(a), ranks(b)))
    return float(torch.corrcoef(both)[0, 1])

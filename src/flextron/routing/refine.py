"""Changes of a sub-network that are likely to lower its loss at the same cost."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flextron.model.decoder import Decoder
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.spec import SearchSpace, SubnetSpec

__all__ = ["CALIBRATION_SEQUENCES", "PRICES_OF_CHANGE", "proposals_around"]

PRICES_OF_CHANGE = (4e-3, 2e-3, 1e-3, 5e-4)
"""Nats for each half layer that changes: the loss model holds for few changes at once."""
CALIBRATION_SEQUENCES = 2
"""Held in memory at once, with what a training step keeps for them."""


def proposals_around(
    decoder: Decoder,
    space: SearchSpace,
    spec: SubnetSpec,
    calibration_BT: Tensor,
    optimum: Callable[[Sensitivity], SubnetSpec],
) -> list[SubnetSpec]:
    """Optima of the loss model around a sub-network, one for each price of change.

    Args:
        decoder: the full model.
        space: the choices.
        spec: the sub-network.
        calibration_BT: sequences for the sensitivities; those of small changes are small, and few tokens do not tell.
        optimum: finds the best sub-network within the budget, given what each choice costs in loss.
    """
    parts = calibration_BT.split(CALIBRATION_SEQUENCES)
    around = Sensitivity.mean([measure_sensitivity(decoder, part, space, around=spec) for part in parts])
    return [optimum(around.with_price_of_change(spec, price)) for price in PRICES_OF_CHANGE]

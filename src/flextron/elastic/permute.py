"""Reorder neurons and attention groups so that importance falls along every nested axis."""

from __future__ import annotations

from flextron.elastic.importance import Importance
from flextron.model.decoder import Decoder
from flextron.model.permutation import Permutation

__all__ = ["Permutation", "permute"]


def permute(decoder: Decoder, importance: Importance) -> Permutation:
    """Sort the full decoder's neurons and groups by importance, in place, and give their order."""
    permutation = Permutation(
        neurons=tuple(order.cpu() for order in importance.neurons),
        groups=tuple(order.cpu() for order in importance.groups),
    )
    permutation.apply(decoder)
    return permutation

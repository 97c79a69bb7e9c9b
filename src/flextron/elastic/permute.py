"""Reorder neurons and attention groups so that importance falls along every nested axis."""

from __future__ import annotations

from dataclasses import replace

from flextron.elastic.importance import Importance
from flextron.model.decoder import Decoder
from flextron.model.origin import PermutedFrom
from flextron.model.permutation import Permutation

__all__ = ["Permutation", "permute"]


def permute(decoder: Decoder, importance: Importance, *, source: str = "", weights: str | None = None) -> Permutation:
    """Sort the full decoder's neurons and groups by importance, in place, and give their order.

    Args:
        decoder: whose config tells from then on what its weights are an order of.
        importance: with the orders.
        source: the checkpoint that it was read from, by name.
        weights: digest of that checkpoint's weights, see `weights_digest`.
    """
    permutation = Permutation(
        neurons=tuple(order.cpu() for order in importance.neurons),
        groups=tuple(order.cpu() for order in importance.groups),
    )
    permutation.apply(decoder)
    decoder.config = replace(decoder.config, origin=PermutedFrom.of(permutation, source, weights))
    return permutation

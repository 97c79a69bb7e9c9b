"""Reorder neurons and attention groups so that importance falls along every nested axis."""

from __future__ import annotations

from dataclasses import replace

from flextron.checkpoints.origin import PermutedFrom
from flextron.checkpoints.permutation import Permutation
from flextron.elastic.importance import Importance
from flextron.model.decoder import Decoder

__all__ = ["Permutation", "permute", "permute_to"]


def permute(decoder: Decoder, importance: Importance, *, source: str = "", weights: str | None = None) -> Permutation:
    """Sort the full decoder's neurons and groups by importance, in place, and give their order.

    Args:
        decoder: whose config tells from then on what its weights are an order of.
        importance: the orders.
        source: the checkpoint that it was read from, by name.
        weights: digest of that checkpoint's weights, see `weights_digest`.
    """
    permutation = Permutation(
        neurons=tuple(order.cpu() for order in importance.neurons),
        groups=tuple(order.cpu() for order in importance.groups),
    )
    permute_to(decoder, permutation, source=source, weights=weights)
    return permutation


def permute_to(decoder: Decoder, permutation: Permutation, *, source: str, weights: str | None = None) -> None:
    """Put the full decoder into a known order, in place; arguments as for `permute`.

    Raises:
        FlextronError: the order is of a model of another shape.
    """
    permutation.check(decoder.config)
    permutation.apply(decoder)
    decoder.config = replace(decoder.config, origin=PermutedFrom.of(permutation, source, weights))

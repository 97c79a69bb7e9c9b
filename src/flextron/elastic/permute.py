"""Reorder neurons and attention groups so that importance falls along every nested axis.

The permuted model computes the same function: projections into a nested dimension and out of it move together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flextron.elastic.importance import Importance
from flextron.model.decoder import Decoder
from flextron.model.layers import Contraction, Layer

__all__ = ["permute"]


def _rows(linear: nn.Linear, order: Tensor) -> None:
    linear.weight.copy_(linear.weight[order])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[order])


def _inputs(contraction: Contraction, order: Tensor) -> None:
    contraction.weight.copy_(contraction.weight[order])


def _expand_units(order: Tensor, rows_per_unit: int) -> Tensor:
    """Row numbers of units that are `rows_per_unit` rows each."""
    return (order[:, None] * rows_per_unit + torch.arange(rows_per_unit, device=order.device)).flatten()


@torch.no_grad()
def permute(decoder: Decoder, importance: Importance) -> None:
    """Sort the full decoder's neurons and groups by importance, in place."""
    config = decoder.config
    for layer, neurons, groups in zip(decoder.layers, importance.neurons, importance.groups, strict=True):
        assert isinstance(layer, Layer)
        neurons, groups = neurons.to(decoder.device), groups.to(decoder.device)
        for linear in (layer.mlp.gate, layer.mlp.up):
            if linear is not None:
                _rows(linear, neurons)
        _inputs(layer.mlp.down, neurons)
        query = _expand_units(groups, config.query_rows_per_group)
        _rows(layer.attention.q, query)
        _inputs(layer.attention.o, query)
        if not config.is_multi_query:
            kv = _expand_units(groups, config.head_dim)
            _rows(layer.attention.k, kv)
            _rows(layer.attention.v, kv)

"""What finetuning in chunks keeps between its units of work.

Shapes: T tokens of all examples that are run, D hidden size, K KV heads, H query heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Saved", "put_rows"]


@dataclass(slots=True)
class Saved:
    """All that is kept between units, besides parameters and token ids."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Input of each layer that has gradients to compute, (T, D)."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Keys of each layer, rotated, (T, K, d)."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Values of each layer, (T, K, d)."""
    products: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """What linears that the caller named gave, with their bypasses, by layer and name, (T, rows)."""
    heads: dict[int, Tensor] = field(default_factory=dict)
    """What each layer's heads gave, (T, H, d), where the caller wants it kept."""
    lse: dict[int, Tensor] = field(default_factory=dict)
    """Logarithms of these heads' sums of exponentials, (T, H)."""
    stream: Tensor | None = None
    """Rows between two layers, (T, D). Forward: outputs of a layer that the one above does not keep as its input.
    Backward: the gradient of one layer's output, whose rows become the input's one chunk after the other."""
    key_value_gradients: tuple[Tensor, Tensor] | None = None
    """Gradients of one layer's keys and values, (T, K, d), as far as later tokens have added theirs."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held."""
        for of_layers in self._by_layer():
            yield from of_layers.values()
        yield from self.products.values()
        yield from self.key_value_gradients or ()
        if self.stream is not None:
            yield self.stream

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the tensors hold."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def past_kv(self, layer: int, seen: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's earlier tokens; empty ones, like another tensor, where it has none."""
        if layer not in self.keys:
            return like.new_zeros(0), like.new_zeros(0)
        return self.keys[layer][seen], self.values[layer][seen]

    def _by_layer(self) -> tuple[dict[int, Tensor], ...]:
        return self.inputs, self.keys, self.values, self.heads, self.lse

    def forget(self, layer: int) -> None:
        """Give up what is kept of a layer, once nothing needs it."""
        for of_layers in self._by_layer():
            of_layers.pop(layer, None)
        for key in [key for key in self.products if key[0] == layer]:
            del self.products[key]
        self.key_value_gradients = None


def put_rows(where: dict[Any, Tensor], key: Any, rows: Tensor, start: int, total: int) -> None:
    """Write a chunk's rows into a tensor of `total` rows, which the first makes; all rows are kept as they are."""
    if len(rows) == total:
        where[key] = rows
        return
    if key not in where:
        where[key] = rows.new_empty(total, *rows.shape[1:])
    where[key][start : start + len(rows)] = rows

"""What each rank holds of a decoder and of its adapters: an equal part of every sub-network, as far as units are whole.

A unit is a neuron or an attention group. Unit j of layer i belongs to rank (i + j) mod W. So the leading units of a
layer are spread over all ranks, whatever their number is, with one more on some ranks where W does not divide it; and
since every layer begins with another rank, what all layers hold together is even, keys and values too. A rank's own
units are in nested order again: the first w of a layer are the first `width(w)` of the rank's.

What lies along a nested dimension is cut: rows of q, k, v, gate and up with their biases, rows of o and down (which are
stored as (in, out)), and with them the parameters of bypasses that lie along the same dimension. All else is whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.bypass import Bypass, Dora, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["OUT_OF_NESTED", "Share", "check_divisible", "cut_parameters", "whole_parameters"]

OUT_OF_NESTED = ("o", "down")
"""Linears whose inputs are nested; the outputs of the others are."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one rank."""

    rank: int
    size: int
    """W, the number of ranks."""

    def first(self, layer: int) -> int:
        """The first unit of a layer that the rank holds; 0 for the rank that adds the biases of the halves."""
        return (self.rank - layer) % self.size

    def width(self, width: int, layer: int) -> int:
        """How many of the first `width` units of a layer the rank holds."""
        return len(range(self.first(layer), width, self.size))

    def spec(self, spec: SubnetSpec) -> SubnetSpec:
        """What the rank holds of a sub-network, as widths of its own."""
        sizes, groups = (
            [self.width(w, i) for i, w in enumerate(widths)] for widths in (spec.intermediate_sizes, spec.num_groups)
        )
        return SubnetSpec.of(sizes, groups)

    def rows(self, whole: Tensor, layer: int, rows_of_unit: int) -> Tensor:
        """The rank's units of the first dimension, each of so many rows."""
        units: Tensor = whole.unflatten(0, (-1, rows_of_unit))
        return units[self.first(layer) :: self.size].flatten(0, 1).contiguous()

    def put(self, own: Tensor, whole: Tensor, layer: int, rows_of_unit: int) -> None:
        """The inverse of `rows`: write the rank's units to their places."""
        whole.unflatten(0, (-1, rows_of_unit))[self.first(layer) :: self.size] = own.unflatten(0, (-1, rows_of_unit))

    def parameters(self, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the rank's parameters; those that are whole are the decoder's own tensors.

        Raises:
            FlextronError: as for `check_divisible`.
        """
        check_divisible(decoder, self.size)
        rows = _rows_each(decoder.config)
        for name, tensor in decoder.state_dict().items():
            *path, target, kind = name.split(".")
            layer = int(path[1]) if path and path[0] == "layers" else 0
            if target in OUT_OF_NESTED and kind == "bias":
                if self.first(layer) == 0:
                    yield name, tensor
            elif path and target in rows:
                yield name, self.rows(tensor, layer, rows[target])
            else:
                yield name, tensor

    def adapter(self, adapter: Adapter) -> Adapter:
        """A copy of the rank's part of an adapter; what stands beside embedding and head is shared, not copied.

        Raises:
            FlextronError: it has bypasses other than LoRA, IA3 and DoRA.
        """
        rows = _rows_each(adapter.config)

        def make(layer: int, target: str, shape: Shape) -> Bypass | None:
            if target not in adapter.at(layer):
                return None
            out = copy.deepcopy(adapter.at(layer)[target])
            cut = _cut_parameters(target, out)
            if target in rows:
                for name in cut:
                    owner, _, own_name = name.rpartition(".")
                    module = out.get_submodule(owner)
                    own = self.rows(getattr(module, own_name).detach(), layer, rows[target])
                    setattr(module, own_name, nn.Parameter(own))
            if isinstance(out, Dora) and target in OUT_OF_NESTED and self.first(layer):
                out.shift = None  # a sum has it once
            return out

        return Adapter(adapter.config, adapter.widths, make, adapter.outer)


def check_divisible(decoder: Decoder, num_ranks: int) -> None:
    """Raise unless every rank gets a part of every layer of a decoder.

    Raises:
        FlextronError: names what ranks cannot share.
    """
    if num_ranks > 1 and decoder.config.qk_norm == "width":
        raise FlextronError(
            f"{decoder.config.family} normalises the queries of all heads as one, which ranks that share them cannot; "
            "use one rank"
        )
    for i, layer in enumerate(decoder.widths.layers):
        for what, width in (("MLP neurons", layer.intermediate_size), ("attention groups", layer.num_groups)):
            if 0 < width < num_ranks:
                raise FlextronError(
                    f"{num_ranks} ranks cannot share the {width} {what} of layer {i}; use at most {width}"
                )


def _rows_each(config: DecoderConfig) -> dict[str, int]:
    """Rows of one unit in a linear's nested dimension, by target; linears that are whole are left out."""
    rows = {"q": config.query_rows_per_group, "o": config.query_rows_per_group, "gate": 1, "up": 1, "down": 1}
    return rows if config.is_multi_query else rows | {"k": config.head_dim, "v": config.head_dim}


def whole_parameters(adapter: Adapter) -> Iterator[nn.Parameter]:
    """The parameters of bypasses that every rank holds whole, in the same order on all."""
    nested = _rows_each(adapter.config).keys()
    for i in adapter.adapted_layers:
        for target, bypass in adapter.at(i).items():
            cut = _cut_parameters(target, bypass) if target in nested else ()
            yield from (p for name, p in bypass.named_parameters() if name not in cut)


def cut_parameters(adapter: Adapter) -> Iterator[tuple[int, str, str, int]]:
    """Layer, target, name and rows of a unit of the parameters of bypasses that are cut, in the same order on all."""
    rows = _rows_each(adapter.config)
    for i in adapter.adapted_layers:
        for target, bypass in adapter.at(i).items():
            if target in rows:
                yield from ((i, target, name, rows[target]) for name in _cut_parameters(target, bypass))


def _cut_parameters(target: str, bypass: Bypass) -> tuple[str, ...]:
    """The parameters of a bypass that lie along its linear's nested dimension."""
    is_input_nested = target in OUT_OF_NESTED
    if isinstance(bypass, Lora):
        return ("a",) if is_input_nested else ("b",)
    if isinstance(bypass, Ia3):
        return ("factors",) if bypass.on_input == is_input_nested else ()
    if isinstance(bypass, Dora):
        if is_input_nested:
            return ("lora.a",)
        return ("lora.b", "factors") if bypass.shift is None else ("lora.b", "factors", "shift")
    raise FlextronError(f"{type(bypass).__name__} cannot be cut for tensor parallelism; use LoRA, DoRA or IA3")

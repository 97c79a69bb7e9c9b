"""An order of a decoder's neurons and attention groups: what `convert` changes about weights, as a value.

The function of the model stays: projections into a nested dimension and out of it move together. What was made beside
the original (an adapter) must move in the same way before it goes with the permuted weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.config import DecoderConfig

if TYPE_CHECKING:
    from flextron.model.decoder import Decoder

__all__ = ["Moves", "Permutation"]

_NEURONS, _GROUPS = "layers.{i}.neurons", "layers.{i}.groups"


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """Origins of the rows of one linear; None on a side that stays."""

    inputs: Tensor | None = None
    """Original number of each input, int64."""
    outputs: Tensor | None = None
    """Original number of each output, int64."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Permutation:
    """An order: for each neuron and group its number in the original."""

    neurons: tuple[Tensor, ...]
    """Order of each layer's MLP neurons, int64, (F,)."""
    groups: tuple[Tensor, ...]
    """Order of each layer's attention groups, int64, (G,)."""

    def moves(self, config: DecoderConfig, layer: int) -> Mapping[str, Moves]:
        """What happens to the linears of a layer, by their names in the decoder; without a gate where it has none."""
        neurons = self.neurons[layer]
        query = _rows(self.groups[layer], config.query_rows_per_group)
        # one KV head that all query heads share has no order
        kv = None if config.is_multi_query else _rows(self.groups[layer], config.head_dim)
        gate = {"gate": Moves(outputs=neurons)} if config.gated else {}
        attention = {"q": Moves(outputs=query), "k": Moves(outputs=kv), "v": Moves(outputs=kv)}
        return (
            attention | gate | {"o": Moves(inputs=query), "up": Moves(outputs=neurons), "down": Moves(inputs=neurons)}
        )

    @torch.no_grad()
    def apply(self, decoder: Decoder) -> None:
        """Put the full decoder's neurons and groups into this order, in place."""
        parameters = dict(decoder.named_parameters())
        for i in range(decoder.config.num_hidden_layers):
            for target, moves in self.moves(decoder.config, i).items():
                half = "attention" if target in "qkvo" else "mlp"
                name = f"layers.{i}.{half}.{target}"
                # projections out of a nested dimension lie as (in, out)
                order = moves.outputs if moves.outputs is not None else moves.inputs
                if order is None:
                    continue
                moved = [parameters[f"{name}.weight"]]
                if moves.outputs is not None and f"{name}.bias" in parameters:
                    moved.append(parameters[f"{name}.bias"])
                if f"{name}_norm.weight" in parameters and decoder.config.qk_norm == "width":
                    moved.append(parameters[f"{name}_norm.weight"])
                for parameter in moved:
                    parameter.copy_(parameter[order.to(parameter.device)])

    @property
    def digest(self) -> str:
        """A digest of the numbers, in a few letters."""
        found = hashlib.sha256()
        for name, order in self.to_tensors().items():
            found.update(name.encode())
            found.update(order.numpy().tobytes())
        return found.hexdigest()[:32]

    def to_tensors(self) -> dict[str, Tensor]:
        """Int32 tensors by name, on the CPU, for a safetensors file."""
        out = {}
        for i, (neurons, groups) in enumerate(zip(self.neurons, self.groups, strict=True)):
            out[_NEURONS.format(i=i)] = neurons.to("cpu", torch.int32).contiguous()
            out[_GROUPS.format(i=i)] = groups.to("cpu", torch.int32).contiguous()
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Permutation:
        """What `to_tensors` gave.

        Raises:
            FlextronError: a layer's order is missing, or is no order.
        """
        layers = range(len(tensors) // 2)
        names = [(_NEURONS.format(i=i), _GROUPS.format(i=i)) for i in layers]
        if tensors.keys() != {name for pair in names for name in pair}:
            raise FlextronError("the permutation lacks layers; make the checkpoint again")
        return cls(
            neurons=tuple(_checked(tensors[name], name) for name, _ in names),
            groups=tuple(_checked(tensors[name], name) for _, name in names),
        )

    def check(self, config: DecoderConfig) -> None:
        """Raise unless it is of a full decoder of this config.

        Raises:
            FlextronError: it has other layers, neurons or groups.
        """
        of_model = [(config.intermediate_size, config.num_groups)] * config.num_hidden_layers
        if [(len(n), len(g)) for n, g in zip(self.neurons, self.groups, strict=True)] != of_model:
            raise FlextronError("the permutation is of a model of other sizes; make the checkpoint again")


def _rows(order: Tensor, rows_each: int) -> Tensor:
    """Row numbers of neurons or groups that are `rows_each` rows each."""
    return (order[:, None] * rows_each + torch.arange(rows_each, device=order.device)).flatten()


def _checked(order: Tensor, name: str) -> Tensor:
    is_order = order.dim() == 1 and not order.is_floating_point() and not order.is_complex()
    if not is_order or not torch.equal(order.long().sort().values, torch.arange(len(order))):
        raise FlextronError(f"{name} of the permutation does not name each of them once; make the checkpoint again")
    return order.long()

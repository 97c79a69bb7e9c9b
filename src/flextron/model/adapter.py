"""An adapter: the bypasses of one task beside any of a decoder's linears."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import cast

from torch import nn

from flextron.errors import FlextronError
from flextron.model.bypass import Bypass, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig
from flextron.model.outer import Outer
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["TARGETS", "Adapter", "linear_shapes"]

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linears that can have a bypass, by their names in the decoder."""


def linear_shapes(config: DecoderConfig, widths: LayerSpec) -> dict[str, Shape]:
    """The linears of a layer in given widths, by target; those of a skipped half are left out."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {}
    if groups := widths.num_groups:
        rows, kv_rows = groups * config.query_rows_per_group, config.kv_rows(groups)
        shapes |= {"q": Shape(hidden, rows), "k": Shape(hidden, kv_rows), "v": Shape(hidden, kv_rows)}
        shapes["o"] = Shape(rows, hidden)
    if neurons := widths.intermediate_size:
        if config.gated:
            shapes["gate"] = Shape(hidden, neurons)
        shapes |= {"up": Shape(hidden, neurons), "down": Shape(neurons, hidden)}
    return shapes


class Adapter(nn.Module):
    """Bypasses beside any of a decoder's linears: one task's parameters, trained, served and stored as one thing."""

    def __init__(
        self,
        config: DecoderConfig,
        widths: SubnetSpec,
        make: Callable[[int, str, Shape], Bypass | None],
        outer: Outer | None = None,
    ) -> None:
        """Make the bypasses.

        Args:
            config: the decoder's.
            widths: the widest sub-network that the adapter is for.
            make: gives the bypass beside a linear (layer, target, shape), or None.
            outer: what it has beside the embedding and the head, if anything.

        Raises:
            FlextronError: it gives none at all.
        """
        super().__init__()
        self.config, self.widths = config, widths
        layers = []
        for i, layer in enumerate(widths.layers):
            made = {t: make(i, t, shape) for t, shape in linear_shapes(config, layer).items()}
            layers.append(nn.ModuleDict({t: b for t, b in made.items() if b is not None}))
        self.layers = nn.ModuleList(layers)
        self.outer = outer
        if outer is None and not any(len(layer) for layer in layers):
            raise FlextronError("the adapter has no bypass at all; name linears that the model has")

    @classmethod
    def lora(
        cls,
        config: DecoderConfig,
        *,
        rank: int,
        alpha: float,
        targets: Collection[str] | None = None,
        widths: SubnetSpec | None = None,
    ) -> Adapter:
        """A fresh LoRA adapter, which changes nothing yet; A is drawn from PyTorch's generator.

        Args:
            config: the decoder's.
            rank: rank of every bypass.
            alpha: what the bypasses add is multiplied by alpha / rank.
            targets: linears, of `TARGETS`; by default all that the family has.
            widths: widest sub-network that it is for; by default the full model.

        Raises:
            FlextronError: the rank is not positive, or a target is not one of the model's linears.
        """
        if rank < 1:
            raise FlextronError(f"the rank of a LoRA adapter must be at least 1, not {rank}")
        chosen = _check_targets(config, targets)
        return cls(
            config,
            widths or config.full_spec,
            lambda _, target, shape: Lora(shape, rank, alpha / rank) if target in chosen else None,
        )

    @classmethod
    def ia3(
        cls,
        config: DecoderConfig,
        *,
        targets: Collection[str] = ("k", "v", "down"),
        input_targets: Collection[str] = ("down",),
        widths: SubnetSpec | None = None,
    ) -> Adapter:
        """A fresh IA3 adapter, which changes nothing yet.

        Args:
            config: the decoder's.
            targets: linears, of `TARGETS`.
            input_targets: those of them whose inputs, not outputs, get the factors (peft's `feedforward_modules`).
            widths: widest sub-network that it is for; by default the full model.

        Raises:
            FlextronError: a target is not one of the model's linears.
        """
        chosen = _check_targets(config, targets)
        return cls(
            config,
            widths or config.full_spec,
            lambda _, target, shape: Ia3(shape, on_input=target in input_targets) if target in chosen else None,
        )

    def at(self, layer: int) -> Mapping[str, Bypass]:
        """The bypasses of a layer, by target."""
        return cast("Mapping[str, Bypass]", self.layers[layer])

    def targets_in(self, layer: int, widths: LayerSpec) -> frozenset[str]:
        """The linears of a layer that have a bypass and run in a sub-network."""
        return frozenset(self.at(layer)) & frozenset(linear_shapes(self.config, widths))

    def check_inner(self, wanted: str) -> None:
        """Raise if there is something beside the embedding or the head.

        Raises:
            FlextronError: there is, so that it cannot be `wanted`.
        """
        if self.outer is not None:
            raise FlextronError(f"the adapter changes the embedding or the head; it can be served, but not {wanted}")

    @property
    def adapted_layers(self) -> tuple[int, ...]:
        """Layers that have a bypass, ascending."""
        return tuple(i for i in range(len(self.layers)) if self.at(i))

    @property
    def is_lora(self) -> bool:
        """Whether all its bypasses are low-rank ones."""
        return all(isinstance(bypass, Lora) for i in self.adapted_layers for bypass in self.at(i).values())

    @property
    def has_mlp(self) -> bool:
        """Whether there is a bypass beside any linear of an MLP."""
        return any(target in ("gate", "up", "down") for i in self.adapted_layers for target in self.at(i))

    def narrowed(self, spec: SubnetSpec) -> Adapter:
        """A copy sliced to a sub-network, to go with its extracted checkpoint.

        Raises:
            FlextronError: the sub-network is not nested in `widths`, or has none of the adapted linears.
        """
        if not spec.is_nested_in(self.widths):
            raise FlextronError("the adapter is for a narrower sub-network; narrow it to one nested in its own widths")
        return Adapter(
            self.config,
            spec,
            lambda i, t, shape: self.at(i)[t].narrowed(shape) if t in self.at(i) else None,
            self.outer,
        )


def _check_targets(config: DecoderConfig, targets: Collection[str] | None) -> Collection[str]:
    present = linear_shapes(config, config.full_spec.layers[0])
    for target in targets or ():
        if target not in present:
            raise FlextronError(f"the model has no linear {target!r}; it has {', '.join(present)}")
    return present if targets is None else targets

"""One sub-network: for each layer, how many of its leading neurons and attention groups run.

Sub-networks are prefixes: after ranking and permuting, "the first w neurons" are the w most important ones, so a spec
is nothing but a list of widths. A width of 0 skips that half of the layer; a layer with both at 0 is skipped whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flextron.errors import FlextronError, shown

__all__ = ["MAX_LAYERS", "MAX_WIDTH", "LayerSpec", "SubnetSpec"]

MAX_LAYERS, MAX_WIDTH = 1024, 2**20
"""Several times what published models have: a damaged file cannot ask for more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """The widths of one layer."""

    intermediate_size: int
    """Leading MLP neurons that run; 0 skips the MLP."""
    num_groups: int
    """Leading attention groups that run (a KV head with its query heads; with a single KV head, one query head);
    0 skips the attention."""

    def __post_init__(self) -> None:
        """Refuse widths that are no sizes."""
        for name in ("intermediate_size", "num_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WIDTH:
                raise FlextronError(f"{name} must be a whole number of at least 0, not {shown(value)}")

    @property
    def is_skipped(self) -> bool:
        """Whether the whole layer is passed over."""
        return self.intermediate_size == 0 and self.num_groups == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SubnetSpec:
    """A sub-network of a decoder, as widths per layer."""

    layers: tuple[LayerSpec, ...]
    """One entry a layer of the full model, skipped layers included."""

    def __post_init__(self) -> None:
        """Refuse a network without layers."""
        if not self.layers:
            raise FlextronError("a sub-network needs at least one layer; give one entry for each layer of the model")
        if len(self.layers) > MAX_LAYERS:
            raise FlextronError(f"a sub-network has at most {MAX_LAYERS} layers, not {len(self.layers)}")

    @classmethod
    def of(cls, intermediate_sizes: Iterable[int], num_groups: Iterable[int]) -> SubnetSpec:
        """Zip two lists, one entry a layer, into a spec.

        Raises:
            FlextronError: the lists differ in length.
        """
        sizes, groups = tuple(intermediate_sizes), tuple(num_groups)
        if len(sizes) != len(groups):
            raise FlextronError(f"{len(sizes)} MLP widths but {len(groups)} attention widths; give one of each a layer")
        return cls(
            layers=tuple(LayerSpec(intermediate_size=w, num_groups=g) for w, g in zip(sizes, groups, strict=True))
        )

    @classmethod
    def uniform(
        cls, *, num_hidden_layers: int, intermediate_size: int, num_groups: int, skip: Iterable[int] = ()
    ) -> SubnetSpec:
        """The same widths in every layer but the skipped ones."""
        skipped = frozenset(skip)
        if not all(0 <= i < num_hidden_layers for i in skipped):
            raise FlextronError(
                f"only layers 0 to {num_hidden_layers - 1} can be skipped, not {shown(sorted(skipped))}"
            )
        kept = [0 if i in skipped else 1 for i in range(num_hidden_layers)]
        return cls.of([intermediate_size * k for k in kept], [num_groups * k for k in kept])

    @property
    def intermediate_sizes(self) -> tuple[int, ...]:
        """MLP widths, layer by layer."""
        return tuple(layer.intermediate_size for layer in self.layers)

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Attention widths, layer by layer."""
        return tuple(layer.num_groups for layer in self.layers)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices of the layers that run at least in part."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.is_skipped)

    @property
    def is_uniform(self) -> bool:
        """Whether all kept layers have the same two widths, neither 0: then it is an ordinary dense model."""
        kept = {self.layers[i] for i in self.kept_layers}
        return len(kept) == 1 and all(layer.intermediate_size and layer.num_groups for layer in kept)

    def is_nested_in(self, other: SubnetSpec) -> bool:
        """Whether every width is at most the other's: then its weights are prefixes (views) of the other's."""
        return len(self.layers) == len(other.layers) and all(
            a.intermediate_size <= b.intermediate_size and a.num_groups <= b.num_groups
            for a, b in zip(self.layers, other.layers, strict=True)
        )

    def narrowed_to(self, other: SubnetSpec) -> SubnetSpec:
        """The widest sub-network that is nested in both; the two are of one model."""
        return SubnetSpec.of(
            map(min, self.intermediate_sizes, other.intermediate_sizes), map(min, self.num_groups, other.num_groups)
        )

    def with_groups_of(self, other: SubnetSpec) -> SubnetSpec:
        """This sub-network, but with at most the other's KV groups: it can read keys and values that the other kept."""
        return SubnetSpec.of(self.intermediate_sizes, map(min, self.num_groups, other.num_groups))

    def to_dict(self) -> dict[str, list[int]]:
        """The JSON form: two lists of widths."""
        return {"intermediate_size": list(self.intermediate_sizes), "num_groups": list(self.num_groups)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SubnetSpec:
        """Read the JSON form.

        Raises:
            FlextronError: a key is missing or unknown, or a width is no size.
        """
        expected = {"intermediate_size", "num_groups"}
        if not isinstance(data, Mapping) or set(data) != expected:
            found = shown(sorted(data, key=str) if isinstance(data, Mapping) else data)
            raise FlextronError(f"a sub-network needs exactly the keys {sorted(expected)}; found {found}")
        if not all(isinstance(data[key], list) for key in expected):
            raise FlextronError("the widths of a sub-network are two lists, one entry a layer")
        return cls.of(data["intermediate_size"], data["num_groups"])

    def describe(self) -> str:
        """One short line for people: kept layers and the range of each width."""

        def span(values: list[int]) -> str:
            return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"

        kept = [self.layers[i] for i in self.kept_layers]
        if not kept:
            return f"0/{len(self.layers)} layers"
        widths = span([layer.intermediate_size for layer in kept])
        groups = span([layer.num_groups for layer in kept])
        return f"{len(kept)}/{len(self.layers)} layers, MLP {widths}, groups {groups}"

"""The sub-networks that a model is trained to hold: the choices of each axis, and which layers may be skipped."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flextron.errors import FlextronError, shown
from flextron.files import checked
from flextron.spec.subnet import MAX_LAYERS, MAX_WIDTH, LayerSpec, SubnetSpec

__all__ = ["SearchSpace"]

_FAR_APART = 0.3
"""Standard deviation of a layer's relative width in sub-networks that are meant to be heterogeneous."""


_Whole = Annotated[int, Field(ge=-MAX_WIDTH, le=MAX_WIDTH)]
_Choices = Annotated[list[_Whole], Field(max_length=4096)]


class _SpaceFile(BaseModel):
    """Types and bounds of the JSON form; what the numbers must be together, the space itself checks."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    num_hidden_layers: Annotated[int, Field(le=MAX_LAYERS)]
    intermediate_sizes: _Choices
    num_groups: _Choices
    skippable_layers: _Choices = []
    max_skipped_layers: _Whole = 0


def _check_choices(name: str, choices: tuple[int, ...]) -> None:
    if not all(type(c) is int for c in choices):
        raise FlextronError(f"{name} must be whole numbers, not {shown(list(choices))}")
    if not choices or any(c <= 0 for c in choices) or list(choices) != sorted(set(choices)):
        raise FlextronError(
            f"{name} must be positive sizes in ascending order without repeats, not {shown(list(choices))}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Choices per axis; a sub-network takes one of each in every layer, or skips the layer."""

    num_hidden_layers: int
    """Layers of the full model."""
    intermediate_sizes: tuple[int, ...]
    """MLP widths in neurons, ascending; the last is the full width."""
    num_groups: tuple[int, ...]
    """Attention widths in groups, ascending; the last is the full width."""
    skippable_layers: tuple[int, ...] = ()
    """Layers that may be skipped, the least important first."""
    max_skipped_layers: int = 0
    """How many of them one sub-network may skip at once."""

    def __post_init__(self) -> None:
        """Check that the choices make sense together."""
        _check_choices("intermediate_sizes", self.intermediate_sizes)
        _check_choices("num_groups", self.num_groups)
        if self.num_hidden_layers < 1:
            raise FlextronError(f"num_hidden_layers must be at least 1, not {self.num_hidden_layers}")
        if len(set(self.skippable_layers)) != len(self.skippable_layers) or not all(
            0 <= i < self.num_hidden_layers for i in self.skippable_layers
        ):
            raise FlextronError(f"skippable_layers must be distinct layers below {self.num_hidden_layers}")
        if not 0 <= self.max_skipped_layers <= len(self.skippable_layers):
            raise FlextronError(f"max_skipped_layers must lie between 0 and {len(self.skippable_layers)}")
        if self.max_skipped_layers >= self.num_hidden_layers:
            raise FlextronError("max_skipped_layers must be below num_hidden_layers: at least one layer must stay")

    @classmethod
    def from_ratios(
        cls,
        *,
        num_hidden_layers: int,
        intermediate_size: int,
        num_groups: int,
        ratios: Iterable[float],
        multiple_of: int,
        skippable_layers: Iterable[int] = (),
        max_skipped_layers: int = 0,
    ) -> SearchSpace:
        """Choices as fractions of the full widths.

        MLP widths are rounded to `multiple_of` (at least one multiple), which suits the hardware's vector width;
        attention widths to whole groups. The full width is always among them.

        Raises:
            FlextronError: a ratio outside (0, 1], or a full width that `multiple_of` does not divide.
        """
        wanted = sorted({float(r) for r in ratios} | {1.0})
        if not all(0 < r <= 1 for r in wanted):
            raise FlextronError(f"ratios must lie in (0, 1], not {wanted}")
        if multiple_of < 1 or intermediate_size < 1 or num_groups < 1:
            raise FlextronError("multiple_of, intermediate_size and num_groups must be at least 1")
        if intermediate_size % multiple_of:
            raise FlextronError(
                f"the MLP width {intermediate_size} is not a multiple of {multiple_of}; choose one that divides it"
            )
        sizes = {max(1, round(r * intermediate_size / multiple_of)) * multiple_of for r in wanted}
        groups = {max(1, round(r * num_groups)) for r in wanted}
        return cls(
            num_hidden_layers=num_hidden_layers,
            intermediate_sizes=tuple(sorted(sizes)),
            num_groups=tuple(sorted(groups)),
            skippable_layers=tuple(skippable_layers),
            max_skipped_layers=max_skipped_layers,
        )

    @property
    def full(self) -> SubnetSpec:
        """The widest sub-network: the original model."""
        return self.uniform(self.intermediate_sizes[-1], self.num_groups[-1])

    @property
    def smallest(self) -> SubnetSpec:
        """The narrowest and shallowest sub-network."""
        return self.uniform(
            self.intermediate_sizes[0], self.num_groups[0], self.skippable_layers[: self.max_skipped_layers]
        )

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of sub-networks."""
        widths = len(self.intermediate_sizes) * len(self.num_groups)
        skips = sum(
            math.comb(len(self.skippable_layers), k) * widths ** (self.num_hidden_layers - k)
            for k in range(self.max_skipped_layers + 1)
        )
        return math.log10(skips)

    def uniform(self, intermediate_size: int, num_groups: int, skip: Iterable[int] = ()) -> SubnetSpec:
        """The sub-network with the same widths in every layer but the skipped ones."""
        return SubnetSpec.uniform(
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=intermediate_size,
            num_groups=num_groups,
            skip=skip,
        )

    def scattered(self, size: float, spread: float, skip: Iterable[int], rng: random.Random) -> SubnetSpec:
        """A sub-network whose widths lie at random around a relative size, layer by layer.

        Args:
            size: 0 for the smallest widths, 1 for the full ones.
            spread: standard deviation of a layer's relative width.
            skip: layers that are skipped.
            rng: source of randomness.
        """

        def pick(choices: tuple[int, ...]) -> int:
            return choices[round(min(max(rng.gauss(size, spread), 0.0), 1.0) * (len(choices) - 1))]

        skipped = frozenset(skip)
        layers = []
        for i in range(self.num_hidden_layers):
            neurons, groups = pick(self.intermediate_sizes), pick(self.num_groups)
            keep = i not in skipped
            layers.append(LayerSpec(intermediate_size=neurons * keep, num_groups=groups * keep))
        return SubnetSpec(layers=tuple(layers))

    def heterogeneous(self, size: float, rng: random.Random) -> SubnetSpec:
        """A sub-network whose widths lie far apart around a relative size, and which skips any number of layers.

        Args:
            size: 0 for the smallest widths, 1 for the full ones.
            rng: source of randomness.
        """
        skipped = rng.sample(self.skippable_layers, rng.randint(0, self.max_skipped_layers))
        return self.scattered(size, _FAR_APART, skipped, rng)

    def check(self, spec: SubnetSpec) -> None:
        """Raise unless the spec is one of this space's sub-networks.

        Raises:
            FlextronError: names the first layer and axis that do not fit, and the choices.
        """
        if len(spec.layers) != self.num_hidden_layers:
            raise FlextronError(f"the spec has {len(spec.layers)} layers, the model {self.num_hidden_layers}")
        skipped = 0
        for i, layer in enumerate(spec.layers):
            if layer.is_skipped:
                skipped += 1
                if i not in self.skippable_layers:
                    raise FlextronError(f"layer {i} may not be skipped; only {shown(list(self.skippable_layers))} may")
                continue
            if layer.intermediate_size not in self.intermediate_sizes:
                raise FlextronError(
                    f"layer {i}: MLP width {layer.intermediate_size} is not among "
                    f"{shown(list(self.intermediate_sizes))}"
                )
            if layer.num_groups not in self.num_groups:
                raise FlextronError(f"layer {i}: {layer.num_groups} groups is not among {shown(list(self.num_groups))}")
        if skipped > self.max_skipped_layers:
            raise FlextronError(f"{skipped} layers are skipped; at most {self.max_skipped_layers} may be")

    def __contains__(self, spec: SubnetSpec) -> bool:
        """Whether `check` passes."""
        try:
            self.check(spec)
        except FlextronError:
            return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Read the JSON form.

        Raises:
            FlextronError: a key is missing or unknown, or the choices make no sense.
        """
        found = checked(_SpaceFile, data, "the search space", "make the checkpoint again with convert")
        return cls(
            num_hidden_layers=found.num_hidden_layers,
            intermediate_sizes=tuple(found.intermediate_sizes),
            num_groups=tuple(found.num_groups),
            skippable_layers=tuple(found.skippable_layers),
            max_skipped_layers=found.max_skipped_layers,
        )

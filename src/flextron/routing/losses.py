"""What sub-networks lose, without what they cost: a frontier that can travel to another device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flextron.errors import FlextronError
from flextron.routing.frontier import Frontier, FrontierPoint
from flextron.routing.latency import LatencyTable
from flextron.spec import SubnetSpec

__all__ = ["KnownLosses", "KnownPoint"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPoint:
    """One sub-network whose loss was measured."""

    spec: SubnetSpec
    kind: str
    """See `FrontierPoint`."""
    params: int
    """Parameters, embeddings included."""
    mem_bytes: int
    """Bytes of its weights as they were measured."""
    kv_bytes_per_token: int
    """Bytes of keys and values that a token of context takes."""
    loss: float
    """Mean loss on the validation text, in nats."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "spec"} | {"spec": self.spec.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLosses:
    """Losses of sub-networks on one text."""

    text: str
    """What they were measured on."""
    points: tuple[KnownPoint, ...]

    @classmethod
    def of(cls, frontier: Frontier) -> KnownLosses:
        """A frontier's, without its device."""
        names = [name for name in KnownPoint.__slots__]
        points = tuple(KnownPoint(**{name: getattr(p, name) for name in names}) for p in frontier.points)
        return cls(text=frontier.text, points=points)

    def priced(self, table: LatencyTable) -> Frontier:
        """The frontier on a device."""
        points = [
            FrontierPoint(
                **{name: getattr(p, name) for name in KnownPoint.__slots__},
                latency_ms=table.predict_ms(p.spec),
                latency=table.predict(p.spec),
            )
            for p in self.points
        ]
        return Frontier.of(table.device, self.text, points)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"text": self.text, "points": [p.to_dict() for p in self.points]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KnownLosses:
        """Read the JSON form.

        Raises:
            FlextronError: keys are missing or unknown.
        """
        try:
            points = tuple(KnownPoint(**{**p, "spec": SubnetSpec.from_dict(p["spec"])}) for p in data["points"])
            return cls(text=str(data["text"]), points=points)
        except (KeyError, TypeError) as error:
            raise FlextronError(f"not the losses of sub-networks ({error}); make the elastic adapter again") from error

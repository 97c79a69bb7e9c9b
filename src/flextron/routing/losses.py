"""What sub-networks lose, without what they cost: a frontier that can travel to another device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flextron.files import checked
from flextron.routing.frontier import Frontier, FrontierPoint
from flextron.routing.latency import LatencyTable
from flextron.spec import SubnetSpec

__all__ = ["KnownLosses", "KnownPoint"]


_Count = Annotated[int, Field(ge=0, le=2**63)]


class _PointFile(BaseModel):
    """The JSON form of a point."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    spec: dict[str, Any]
    kind: str
    params: _Count
    mem_bytes: _Count
    kv_bytes_per_token: _Count
    loss: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class _LossesFile(BaseModel):
    """The JSON form of all."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str
    points: Annotated[list[_PointFile], Field(min_length=1)]


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

    def with_loss(self, loss: float) -> KnownPoint:
        """The same sub-network with another loss."""
        return replace(self, loss=loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLosses:
    """Losses of sub-networks on one text."""

    text: str
    """What they were measured on."""
    points: tuple[KnownPoint, ...]

    @classmethod
    def of(cls, frontier: Frontier) -> KnownLosses:
        """A frontier's, without its device."""
        points = tuple(KnownPoint(**{name: getattr(p, name) for name in KnownPoint.__slots__}) for p in frontier.points)
        return cls(text=frontier.text, points=points)

    def priced(self, table: LatencyTable) -> Frontier:
        """The frontier on a device."""
        points = []
        for point in self.points:
            known = {name: getattr(point, name) for name in point.__slots__}
            ms, latency = table.predict_ms(point.spec), table.predict(point.spec)
            points.append(FrontierPoint(**known, latency_ms=ms, latency=latency))
        return Frontier.of(table.device, self.text, points)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"text": self.text, "points": [p.to_dict() for p in self.points]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KnownLosses:
        """Read the JSON form.

        Raises:
            FlextronError: it does not fit.
        """
        file = checked(_LossesFile, data, "the losses of sub-networks", "make the elastic adapter again")
        points = (KnownPoint(**p.model_dump() | {"spec": SubnetSpec.from_dict(p.spec)}) for p in file.points)
        return cls(text=file.text, points=tuple(points))

"""What sub-networks lose, without what they cost: a frontier that can travel to another device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flextron.files import checked
from flextron.routing.frontier import Frontier, FrontierPoint
from flextron.routing.latency import LatencyTable
from flextron.routing.point import KnownPoint, KnownPointFile
from flextron.spec import SubnetSpec

__all__ = ["KnownLosses"]


class _LossesFile(BaseModel):
    """The JSON form of all."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str
    points: Annotated[list[KnownPointFile], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLosses:
    """Losses of sub-networks on one text."""

    text: str
    """What they were measured on."""
    points: tuple[KnownPoint, ...]

    @classmethod
    def of(cls, frontier: Frontier) -> KnownLosses:
        """A frontier's, without its device."""
        return cls(text=frontier.text, points=tuple(KnownPoint(**p.known()) for p in frontier.points))

    def priced(self, table: LatencyTable) -> Frontier:
        """The frontier on a device."""
        points = []
        for point in self.points:
            ms, latency = table.predict_ms(point.spec), table.predict(point.spec)
            points.append(FrontierPoint(**point.known(), latency_ms=ms, latency=latency))
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

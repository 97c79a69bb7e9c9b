"""Measured sub-networks: what each costs and loses, and the best one for a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flextron.errors import FlextronError
from flextron.files import checked
from flextron.routing.point import Count, KnownPoint, KnownPointFile
from flextron.spec import SubnetSpec, Target

__all__ = ["Frontier", "FrontierPoint"]


_Measure = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Name = Annotated[str, Field(max_length=10_000)]


class _PointFile(KnownPointFile):
    """The JSON form of a point."""

    kv_bytes_per_token: Count = 0
    latency_ms: _Measure
    latency: _Measure


class _FrontierFile(BaseModel):
    """The JSON form of a frontier."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    device: _Name
    text: _Name
    points: Annotated[list[_PointFile], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint(KnownPoint):
    """One sub-network whose loss and latency are known."""

    latency_ms: float
    """Milliseconds of a decode step, from the latency table."""
    latency: float
    """The same as a fraction of the full network's."""

    def measure(self, target: Target) -> float:
        """What a limit on latency or size limits, in the target's unit."""
        if target.axis == "memory_gb":
            return (self.mem_bytes + target.context * self.kv_bytes_per_token) / 1e9
        return float(getattr(self, target.axis))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FrontierPoint:
        """Read the JSON form.

        Raises:
            FlextronError: keys are missing, unknown, or have values of the wrong type or size.
        """
        found = checked(_PointFile, data, "the measured sub-network", "measure again with profile")
        return cls(**{**found.model_dump(), "spec": SubnetSpec.from_dict(found.spec)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """All sub-networks that a search measured on one device and one text."""

    device: str
    """Fingerprint of the device."""
    text: str
    """What the losses were measured on."""
    points: tuple[FrontierPoint, ...]
    """Measured sub-networks by falling number of parameters; the full network is the first."""

    @classmethod
    def of(cls, device: str, text: str, points: Iterable[FrontierPoint]) -> Frontier:
        """Order the points."""
        return cls(device=device, text=text, points=tuple(sorted(points, key=lambda p: (-p.params, -p.latency_ms))))

    @property
    def full(self) -> FrontierPoint:
        """The full network."""
        return self.points[0]

    def best(self) -> tuple[FrontierPoint, ...]:
        """The points that no other beats in both latency and loss, by falling latency."""
        kept: list[FrontierPoint] = []
        for point in sorted(self.points, key=lambda p: (p.latency_ms, p.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return tuple(reversed(kept))

    def select(self, target: Target, *, allowed: Callable[[SubnetSpec], bool] | None = None) -> FrontierPoint:
        """The best measured sub-network within a target.

        For a limit on latency or size that is the one with the lowest loss; for a limit on loss, the fastest.

        Args:
            target: the limit.
            allowed: which sub-networks may be chosen; all by default.

        Raises:
            FlextronError: none is within the target; names the reachable range.
        """
        points = [p for p in self.points if allowed is None or allowed(p.spec)]
        if not points:
            raise FlextronError("none of the measured sub-networks is of the kind that was asked for")
        if target.axis == "max_loss_increase":
            limit = self.full.loss * (1 + target.value)
            good = [p for p in points if p.loss <= limit]
            if not good:
                least = min(p.loss for p in points) / self.full.loss - 1
                raise FlextronError(f"no such sub-network loses that little; the least is {least:.4g}")
            return min(good, key=lambda p: (p.latency_ms, p.loss))
        measures = {p: p.measure(target) for p in points}
        within = [p for p in points if measures[p] <= target.value * (1 + 1e-9)]
        if not within:
            low, high = min(measures.values()), max(measures.values())
            raise FlextronError(
                f"no sub-network reaches {target.axis}={target.value:g}; this model spans {low:.4g} to {high:.4g}"
            )
        return min(within, key=lambda p: (p.loss, p.latency_ms))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"device": self.device, "text": self.text, "points": [p.to_dict() for p in self.points]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Frontier:
        """Read the JSON form.

        Raises:
            FlextronError: keys are missing, or have values of the wrong type or size.
        """
        found = checked(_FrontierFile, data, "the frontier", "measure again with profile")
        points = [FrontierPoint(**{**p.model_dump(), "spec": SubnetSpec.from_dict(p.spec)}) for p in found.points]
        return cls.of(found.device, found.text, points)

"""A sub-network whose loss was measured: what is true of it on every device."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flextron.spec import SubnetSpec

__all__ = ["Count", "KnownPoint", "KnownPointFile"]

Count = Annotated[int, Field(ge=0, le=2**63)]


class KnownPointFile(BaseModel):
    """The JSON form of a point."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    spec: dict[str, Any]
    kind: Annotated[str, Field(max_length=10_000)]
    params: Count
    mem_bytes: Count
    kv_bytes_per_token: Count
    loss: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPoint:
    """One sub-network whose loss was measured."""

    spec: SubnetSpec
    kind: str
    """How it was found: `uniform`, `guided`, `refined`, `router`, `mix'n'match` or `random`."""
    params: int
    """Parameters, embeddings included."""
    mem_bytes: int
    """Bytes of its weights as they were measured."""
    kv_bytes_per_token: int = 0
    """Bytes of keys and values that a token of context takes."""
    loss: float
    """Mean loss on the validation text, in nats."""

    def known(self) -> dict[str, Any]:
        """The fields of `KnownPoint`, also of a point of which more is known."""
        return {field.name: getattr(self, field.name) for field in fields(KnownPoint)}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"spec": self.spec.to_dict()}

    def with_loss(self, loss: float) -> KnownPoint:
        """The same sub-network with another loss."""
        return replace(self, loss=loss)

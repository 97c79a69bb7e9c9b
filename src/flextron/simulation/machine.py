"""A machine as numbers: how long iterations and units of finetuning take, and how much its cache holds.

They come from a file that says so, such as one with published figures of a GPU, or from what was measured of a model
(`simulation/profile.py`, `simulation/measure.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flextron.errors import FlextronError
from flextron.files import checked, read_json, write_json

__all__ = ["Machine", "NetworkTimes", "TrainingTimes", "UnitTime"]

_REMEDY = "see the guide on simulating for its form"
_Ms = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Tokens = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
_Count = Annotated[int, Field(ge=1, le=2**40)]
_Curve = Annotated[dict[_Tokens, Annotated[float, Field(gt=0, le=1e9)]], Field(min_length=2, max_length=1000)]
_Jitter = Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(max_length=10_000)]
UnitKind = Literal["forward", "head", "backward", "update"]


class _UnitFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    fixed_ms: _Ms
    token_ms: _Ms


class _TrainingFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    forward: _UnitFile
    head: _UnitFile
    backward: _UnitFile
    update: _UnitFile
    jitter: _Jitter = []


class _NetworkFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    latency: _Share
    loss: _Ms | None = None
    kv_share: _Share = 1.0
    iteration_ms: _Curve | None = None


class _MachineFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    source: Annotated[str, Field(max_length=10_000)] = ""
    iteration_ms: _Curve
    sub_networks: Annotated[list[_NetworkFile], Field(max_length=1000)] = []
    kv_cache_tokens: _Count
    context: _Count
    max_num_seqs: Annotated[int, Field(ge=1, le=100_000)] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 256
    ms_per_1000_keys: _Ms = 0.0
    ms_per_1000000_pairs: _Ms = 0.0
    jitter: _Jitter = []
    training: _TrainingFile | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkTimes:
    """A sub-network of a machine's model."""

    latency: float
    """Latency target that it is for, a fraction of the full network's."""
    loss: float | None = None
    """Mean loss in nats, where it is known."""
    kv_share: float = 1.0
    """Bytes of keys and values of a token, as a fraction of the full network's."""
    points: tuple[tuple[int, float], ...]
    """Tokens of an iteration and its milliseconds, rising; between two points on a straight line, beyond the last one
    on the line through the last two."""

    def ms(self, num_tokens: int) -> float:
        """Milliseconds of an iteration of so many tokens, all in this sub-network."""
        sizes = [size for size, _ in self.points]
        if num_tokens <= sizes[0]:
            return self.points[0][1]
        i = min(bisect_left(sizes, num_tokens), len(sizes) - 1)
        (left, low), (right, high) = self.points[i - 1 : i + 1]
        return low + (high - low) * (num_tokens - left) / (right - left)


@dataclass(frozen=True, slots=True)
class UnitTime:
    """What a unit of finetuning takes."""

    fixed_ms: float
    """Milliseconds, however small it is."""
    token_ms: float
    """Milliseconds that each token adds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTimes:
    """What units of finetuning take: one layer for some tokens each, apart from head and update."""

    num_layers: int
    forward: UnitTime
    head: UnitTime
    """The head and the loss, both ways; its tokens are those that are learnt."""
    backward: UnitTime
    update: UnitTime
    """A step of the optimizer, which has one token."""
    jitter: tuple[float, ...] = ()
    """Factors on the time of a unit, with equal chances; none for always the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """All that a simulation knows of a replica's hardware and model."""

    name: str
    source: str = ""
    """Where the numbers are from."""
    networks: tuple[NetworkTimes, ...]
    """Sub-networks by falling latency; the first is the full one, of latency 1."""
    kv_cache_tokens: int
    """Tokens in the full network whose keys and values the cache holds."""
    context: int
    """Most tokens of prompt and answer together."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    max_num_batched_tokens: int = 256
    """Tokens of an iteration."""
    ms_per_1000_keys: float = 0.0
    """What an iteration takes longer for 1,000 keys that decoding requests attend to, over all layers."""
    ms_per_1000000_pairs: float = 0.0
    """What it takes longer for a million pairs of a prompt's token and a key."""
    jitter: tuple[float, ...] = ()
    """Factors on the time of an iteration, with equal chances; none for always the same time."""
    training: TrainingTimes | None = None
    """Times of finetuning, where they are known."""

    def __post_init__(self) -> None:
        """Refuse what no machine is.

        Raises:
            FlextronError: the full network is missing, or a narrower or smaller iteration takes longer.
        """
        latencies = [network.latency for network in self.networks]
        if not latencies or latencies[0] != 1 or sorted(set(latencies), reverse=True) != latencies:
            raise FlextronError(
                f"the sub-networks of {self.name} must have different latencies and begin with 1, the full one"
            )
        for network in self.networks:
            sizes, times = zip(*network.points, strict=True)
            if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or list(times) != sorted(times):
                raise FlextronError(
                    f"an iteration of {self.name} at latency {network.latency:g} must take longer, or as long, with "
                    "more tokens; give times of at least two sizes that do"
                )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise FlextronError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) of {self.name} must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request gets its token"
            )

    def within(self, latency: float) -> int:
        """Index of the widest sub-network for a latency target; the narrowest where none is within it."""
        found = (i for i, network in enumerate(self.networks) if network.latency <= latency + 1e-9)
        return next(found, len(self.networks) - 1)

    @classmethod
    def read(cls, path: Path) -> Machine:
        """Read a file of numbers.

        Raises:
            FlextronError: it is missing or damaged, or its numbers are of no machine.
        """
        if not path.exists():
            raise FlextronError(f"{path} does not exist; give a profiled elastic checkpoint or a machine's file")
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, data: Any, what: str = "the machine") -> Machine:
        """Read the JSON form; see `read`."""
        found = checked(_MachineFile, data, what, _REMEDY)
        full = _points(found.iteration_ms)
        networks = [
            NetworkTimes(
                latency=n.latency,
                loss=n.loss,
                kv_share=n.kv_share,
                points=tuple((size, ms * n.latency) for size, ms in full)
                if n.iteration_ms is None
                else _points(n.iteration_ms),
            )
            for n in sorted(found.sub_networks, key=lambda n: -n.latency)
        ]
        if not networks or networks[0].latency != 1:
            networks.insert(0, NetworkTimes(latency=1.0, points=full))
        training = None
        if found.training is not None:
            units = {kind: UnitTime(**getattr(found.training, kind).model_dump()) for kind in UnitKind.__args__}  # type: ignore[attr-defined]
            jitter = tuple(found.training.jitter)
            training = TrainingTimes(num_layers=found.training.num_layers, jitter=jitter, **units)
        same = ("name", "source", "kv_cache_tokens", "context", "max_num_seqs", "max_num_batched_tokens")
        more = ("ms_per_1000_keys", "ms_per_1000000_pairs")
        values = {key: getattr(found, key) for key in (*same, *more)}
        return cls(networks=tuple(networks), training=training, jitter=tuple(found.jitter), **values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        values: dict[str, Any] = {
            "name": self.name,
            "source": self.source,
            "iteration_ms": _curve(self.networks[0]),
            "sub_networks": [
                {"latency": n.latency, "loss": n.loss, "kv_share": n.kv_share, "iteration_ms": _curve(n)}
                for n in self.networks
            ],
            "kv_cache_tokens": self.kv_cache_tokens,
            "context": self.context,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "ms_per_1000_keys": self.ms_per_1000_keys,
            "ms_per_1000000_pairs": self.ms_per_1000000_pairs,
            "jitter": list(self.jitter),
        }
        if self.training is not None:
            kinds = {kind: getattr(self.training, kind) for kind in ("forward", "head", "backward", "update")}
            units = {kind: {"fixed_ms": u.fixed_ms, "token_ms": u.token_ms} for kind, u in kinds.items()}
            values["training"] = {"num_layers": self.training.num_layers, **units, "jitter": list(self.training.jitter)}
        return values

    def write(self, path: Path) -> None:
        """Write a file that `read` takes."""
        write_json(path, self.to_dict())


def _points(curve: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted((int(size), ms) for size, ms in curve.items()))


def _curve(network: NetworkTimes) -> dict[str, float]:
    return {str(size): ms for size, ms in network.points}

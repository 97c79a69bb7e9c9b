"""How long a step of a sub-network takes on this device: a table fitted to measurements of whole networks.

Blocks are never timed alone: one block's weights stay in the cache when it runs again and again, a network's do not.
Instead whole networks with known widths are timed, round robin so that drift hits all alike, and the cost of each
choice is the least-squares solution. Networks that the fit has not seen give its error.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from flextron.errors import FlextronError
from flextron.files import checked
from flextron.generation.decoding import Steps
from flextron.model.config import DecoderConfig
from flextron.model.cost import block_parameters, layer_parameters
from flextron.model.decoder import Decoder
from flextron.model.device import wait_for
from flextron.progress import OnProgress
from flextron.routing.device import device_fingerprint
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec

__all__ = ["LatencyTable", "Phase", "measure_table", "step_latencies_ms"]

_NUM_FIT, _NUM_HELD_OUT = 12, 8
_MOST_ERROR = 0.15
"""Median error from which on a measurement is in doubt; on a quiet machine it is 0.01 to 0.03."""
Phase = Literal["decode", "prefill"]
_Width = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,7}$")]
_Ms = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class _TableFile(BaseModel):
    """The JSON form of a latency table."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    device: Annotated[str, Field(max_length=10_000)]
    batch_size: Annotated[int, Field(ge=1, le=2**31)]
    context: Annotated[int, Field(ge=0, le=2**31)]
    base_ms: _Ms
    mlp_ms: Annotated[dict[_Width, _Ms], Field(min_length=1)]
    attention_ms: Annotated[dict[_Width, _Ms], Field(min_length=1)]
    full_ms: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
    median_error: _Ms
    max_error: _Ms
    phase: Phase = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyTable:
    """Additive costs of a step's parts."""

    device: str
    """Fingerprint of the device it was measured on."""
    batch_size: int
    """Sequences of a step."""
    context: int
    """Tokens that each sequence holds."""
    base_ms: float
    """Milliseconds of everything but the layers: embedding, head, choosing the likeliest token."""
    mlp_ms: Mapping[int, float]
    """Milliseconds of one layer's MLP, by width."""
    attention_ms: Mapping[int, float]
    """Milliseconds of one layer's attention, by groups."""
    full_ms: float
    """Measured milliseconds of the full network."""
    median_error: float
    """Median relative error on networks that the fit did not see."""
    max_error: float
    """Largest relative error on them."""
    phase: Phase = "decode"
    """Whether a step generates one token of each sequence, or reads all of its context."""

    @property
    def name(self) -> str:
        """Name of the table's file: the device, and the phase where it is not decode."""
        return self.device if self.phase == "decode" else f"{self.device}-{self.phase}"

    @property
    def warning(self) -> str | None:
        """Why its latencies may be wrong, in a sentence; None if they hold for networks that the fit did not see."""
        if self.median_error <= _MOST_ERROR:
            return None
        return (
            f"latencies of sub-networks that were measured only to check are off by {self.median_error:.0%}: other "
            "programs kept this machine busy; measure again when it is quiet"
        )

    @classmethod
    def of_parameters(cls, config: DecoderConfig, space: SearchSpace) -> LatencyTable:
        """Parameters of the layers in place of milliseconds: costs that hold on every device."""

        def cost(neurons: int, groups: int) -> float:
            return float(layer_parameters(config, LayerSpec(intermediate_size=neurons, num_groups=groups)))

        return cls(
            device="parameters",
            batch_size=1,
            context=1,
            base_ms=0.0,
            mlp_ms={w: cost(w, 0) for w in space.intermediate_sizes},
            attention_ms={g: cost(0, g) for g in space.num_groups},
            full_ms=float(block_parameters(config, space.full)),
            median_error=0.0,
            max_error=0.0,
        )

    def layer_ms(self, layer: LayerSpec) -> float:
        """Milliseconds of one layer."""
        mlp = self.mlp_ms[layer.intermediate_size] if layer.intermediate_size else 0.0
        return mlp + (self.attention_ms[layer.num_groups] if layer.num_groups else 0.0)

    def predict_ms(self, spec: SubnetSpec) -> float:
        """Milliseconds of a step in a sub-network of the space."""
        return self.base_ms + sum(self.layer_ms(layer) for layer in spec.layers)

    def predict(self, spec: SubnetSpec) -> float:
        """The same as a fraction of the full network's."""
        full = SubnetSpec.uniform(
            num_hidden_layers=len(spec.layers), intermediate_size=max(self.mlp_ms), num_groups=max(self.attention_ms)
        )
        return self.predict_ms(spec) / self.predict_ms(full)

    def check(self, space: SearchSpace) -> None:
        """Raise unless the table has the costs of exactly a search space's choices.

        Raises:
            FlextronError: it is of another one.
        """
        own = sorted(self.mlp_ms), sorted(self.attention_ms)
        if own != (list(space.intermediate_sizes), list(space.num_groups)):
            raise FlextronError(
                f"the latency table of {self.name} is of another model or search space (MLP widths and groups {own}); "
                "delete it and measure it again with profile"
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the widths become string keys."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Read the JSON form.

        Raises:
            FlextronError: keys are missing or unknown, or have values of the wrong type or size.
        """
        found = checked(_TableFile, data, "the latency table", "measure it again with profile")
        mlp_ms, attention_ms = (
            {int(width): ms for width, ms in costs.items()} for costs in (found.mlp_ms, found.attention_ms)
        )
        table = cls(**found.model_dump() | {"mlp_ms": mlp_ms, "attention_ms": attention_ms})
        if not table.base_ms + max(table.mlp_ms.values()) + max(table.attention_ms.values()) > 0:
            raise FlextronError("the latency table has no time for a whole network; measure it again with profile")
        return table


class _Probe:
    """Runs one step of a sub-network again and again: the same token behind a full cache, or the same prompts."""

    def __init__(self, decoder: Decoder, spec: SubnetSpec, batch_size: int, context: int, phase: Phase) -> None:
        self._device = decoder.device
        length, start = (context, 0) if phase == "prefill" else (1, context)
        self._steps = Steps(decoder, spec, batch_size, start + length, likeliest=True)
        self._new = [torch.zeros(length, dtype=torch.long, device=decoder.device)] * batch_size
        self._starts = [start] * batch_size

    @torch.inference_mode()
    def run_ms(self) -> float:
        """Milliseconds of one step."""
        wait_for(self._device)
        start = time.perf_counter()
        self._steps.run(self._new, self._starts).argmax(-1)
        wait_for(self._device)
        return (time.perf_counter() - start) * 1e3


def step_latencies_ms(
    decoder: Decoder,
    specs: Sequence[SubnetSpec],
    *,
    batch_size: int = 1,
    context: int = 128,
    phase: Phase = "decode",
    repeats: int = 15,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Median milliseconds of a step in each sub-network, measured round robin after a warm-up."""
    decoder.config.check_length(context + 1)
    probes = [_Probe(decoder, spec, batch_size, context, phase) for spec in specs]
    times: list[list[float]] = [[] for _ in probes]
    # on a GPU, the second round captures what the others repeat
    warm_up = 2 if decoder.device.type == "cuda" else 1
    for r in range(repeats + warm_up):
        for probe, measured in zip(probes, times, strict=True):
            elapsed = probe.run_ms()
            if r >= warm_up:
                measured.append(elapsed)
        if on_progress is not None:
            on_progress(r + 1, repeats + warm_up)
    return [statistics.median(measured) for measured in times]


def _features(spec: SubnetSpec, space: SearchSpace) -> list[float]:
    """Counts of each choice, after a 1 for the base."""
    sizes, groups = spec.intermediate_sizes, spec.num_groups
    return [
        1.0,
        *(float(sizes.count(w)) for w in space.intermediate_sizes),
        *(float(groups.count(g)) for g in space.num_groups),
    ]


def measure_table(
    decoder: Decoder,
    space: SearchSpace,
    *,
    batch_size: int = 1,
    context: int = 128,
    phase: Phase = "decode",
    repeats: int = 15,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> LatencyTable:
    """Time whole networks on the decoder's device and fit the table to them.

    Args:
        decoder: the full model.
        space: its choices.
        batch_size: sequences of a decode step.
        context: tokens that each holds.
        phase: what a step does.
        repeats: timed steps of each network, of which the median counts.
        seed: seed of the random networks.
        on_progress: called with rounds done and rounds in all.
    """
    full_width, full_groups = space.intermediate_sizes[-1], space.num_groups[-1]
    design = [space.full, *(space.uniform(w, full_groups) for w in (0, *space.intermediate_sizes[:-1]))]
    design += [space.uniform(full_width, g) for g in (0, *space.num_groups[:-1])]
    design += [space.uniform(0, 0)]
    rng = random.Random(seed)
    design += [space.heterogeneous(rng.random(), rng) for _ in range(_NUM_FIT)]
    held_out = [space.heterogeneous(rng.random(), rng) for _ in range(_NUM_HELD_OUT)]
    times = step_latencies_ms(
        decoder,
        design + held_out,
        batch_size=batch_size,
        context=context,
        phase=phase,
        repeats=repeats,
        on_progress=on_progress,
    )
    costs = _fit([_features(spec, space) for spec in design], times[: len(design)])
    num_widths = len(space.intermediate_sizes)
    table = LatencyTable(
        device=device_fingerprint(decoder.device, decoder.dtype),
        batch_size=batch_size,
        context=context,
        base_ms=costs[0],
        mlp_ms=dict(zip(space.intermediate_sizes, costs[1 : 1 + num_widths], strict=True)),
        attention_ms=dict(zip(space.num_groups, costs[1 + num_widths :], strict=True)),
        full_ms=times[0],
        median_error=0.0,
        max_error=0.0,
        phase=phase,
    )
    errors = [abs(table.predict_ms(s) / t - 1) for s, t in zip(held_out, times[len(design) :], strict=True)]
    return replace(table, median_error=statistics.median(errors), max_error=max(errors))


def _fit(rows: list[list[float]], times: list[float]) -> list[float]:
    """Least squares in relative error, so that small networks count as much as large ones."""
    weights = 1 / torch.tensor(times, dtype=torch.float64)
    a = torch.tensor(rows, dtype=torch.float64) * weights[:, None]
    solution = torch.linalg.lstsq(a, torch.ones(len(times), dtype=torch.float64)[:, None]).solution
    return [max(0.0, float(x)) for x in solution[:, 0]]

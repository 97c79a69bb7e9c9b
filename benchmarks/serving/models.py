"""Models and sub-networks that the suite measures, and how often."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

from torch import Tensor

from benchmarks import smollm2
from flextron.api import ElasticModel, load
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.routing import FrontierPoint
from flextron.spec import SubnetSpec

__all__ = ["ELASTIC", "PAUSE", "ROUNDS", "SHARES", "elastic", "matrices", "num_bytes", "original", "subnets"]

_DEMO = Path("out/demo")
ELASTIC = _DEMO / "elastic"
SHARES = (0.75, 0.5, 0.35)
"""Of the full network's bytes."""
ROUNDS = 11
PAUSE = 0.03
"""Seconds; idle threads of one library spin for some milliseconds and would hold up the next."""


@cache
def elastic() -> ElasticModel:
    """The demo's model, with the adapter that the package holds; runs the demo where it was not run yet."""
    if not ELASTIC.is_dir():
        command = [sys.executable, "-m", "flextron", "demo", "--output", str(_DEMO), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load(ELASTIC)


@cache
def original() -> Decoder:
    """What llama.cpp and transformers run in the comparisons of speed."""
    return smollm2.decoder()


def num_bytes(spec: SubnetSpec) -> int:
    """Weights that a decode step reads in float32; the embedding is the head, too."""
    return 4 * num_parameters(elastic().decoder.config, spec)


@cache
def matrices() -> list[Tensor]:
    """The layers' weights, as PyTorch multiplies with them: input dimension last."""
    layers = original().layers
    rows = [w for layer in layers for w in (layer.attention.q, layer.attention.k, layer.attention.v)]
    rows += [w for layer in layers for w in (layer.mlp.gate, layer.mlp.up)]
    columns = [layer.attention.o for layer in layers] + [layer.mlp.down for layer in layers]
    return [m.weight for m in rows] + [m.weight.t().contiguous() for m in columns]


@cache
def subnets() -> list[SubnetSpec]:
    """The full network, and the measured ones whose bytes come nearest to the shares."""
    model = elastic()
    full = model.space.full
    assert model.frontier is not None

    def distance(point: FrontierPoint, share: float) -> float:
        return abs(num_bytes(point.spec) / num_bytes(full) - share)

    return [full, *(min(model.frontier.points, key=lambda p: distance(p, s)).spec for s in SHARES)]

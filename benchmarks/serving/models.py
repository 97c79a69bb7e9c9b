"""Models and sub-networks that the suite measures, and how often."""

from __future__ import annotations

from functools import cache

from benchmarks import smollm2
from benchmarks.core import DEMO, demo_record
from flextron.api import ElasticModel, load
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.routing import FrontierPoint
from flextron.spec import SubnetSpec

__all__ = ["ELASTIC", "PAUSE", "ROUNDS", "SHARES", "elastic", "num_bytes", "original", "subnets"]

ELASTIC = DEMO / "elastic"
SHARES = (0.75, 0.5, 0.35)
"""Of the full network's bytes."""
ROUNDS = 11
PAUSE = 0.03
"""Seconds; idle threads of one library spin for some milliseconds and would hold up the next."""


@cache
def elastic() -> ElasticModel:
    """The demo's trained model."""
    demo_record()
    return load(ELASTIC)


@cache
def original() -> Decoder:
    """What llama.cpp and transformers run in the comparisons of speed."""
    return smollm2.decoder()


def num_bytes(spec: SubnetSpec) -> int:
    """Weights that a decode step reads in float32; the embedding is the head, too."""
    return 4 * num_parameters(elastic().decoder.config, spec)


@cache
def subnets() -> list[SubnetSpec]:
    """The full network, and the measured ones whose bytes come nearest to the shares."""
    model = elastic()
    full = model.space.full
    assert model.frontier is not None

    def distance(point: FrontierPoint, share: float) -> float:
        return abs(num_bytes(point.spec) / num_bytes(full) - share)

    return [full, *(min(model.frontier.points, key=lambda p: distance(p, s)).spec for s in SHARES)]

"""The routing suite: the latency table, the surrogate, and the routers, on the demo's trained SmolLM2."""

from __future__ import annotations

import random
import statistics
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.core import demo_record
from benchmarks.harness import Figure, median, run_suite
from flextron.api import ElasticModel, evaluation_text, load
from flextron.api.texts import windows
from flextron.model.scoring import mean_loss
from flextron.routing.compare import uniform_within
from flextron.routing.latency import LatencyTable, measure_table, step_latencies_ms
from flextron.spec import SubnetSpec
from flextron.training.routers import RouterRecipe, RouterResult, train_static_router

__all__ = ["run"]

_TARGETS = tuple(0.4 + 0.6 * j / 19 for j in range(20))
_COMPARED = (0.95, 0.85, 0.75, 0.65, 0.55)


@cache
def _model() -> ElasticModel:
    demo_record()
    return load("out/demo/elastic")


@cache
def _table() -> LatencyTable:
    return measure_table(_model().decoder, _model().space)


@cache
def _windows() -> tuple[Tensor, Tensor]:
    """For the router, and for what is reported: parts of the topics that the demo did not train on."""
    topics = evaluation_text()
    calibration = windows(topics[1::4], _model().tokenizer, num_tokens=1024, context=256)
    return calibration, windows(topics[3::4], _model().tokenizer, num_tokens=3072, context=256)


@cache
def _routed() -> RouterResult:
    with tempfile.TemporaryDirectory() as directory:
        return train_static_router(
            _model().decoder, _model().space, _table(), _windows()[0], RouterRecipe(), run_directory=Path(directory)
        )


def table_error() -> Figure:
    """Whole-network latency predicted for 30 unseen heterogeneous sub-networks."""
    space, rng = _model().space, random.Random("unseen")
    specs = [space.heterogeneous(rng.random(), rng) for _ in range(30)]
    times = step_latencies_ms(_model().decoder, specs)
    errors = [abs(_table().predict_ms(s) / t - 1) for s, t in zip(specs, times, strict=True)]
    worst_holds = max(errors) <= 0.1
    return Figure(
        name="latency predicted for 30 unseen heterogeneous sub-networks: median error",
        value=statistics.median(errors) if worst_holds else max(errors),
        unit="relative",
        op="<=",
        bar=0.03,
        spread=median(errors),
        note=f"worst {max(errors):.1%} (bar 10 %); where that is missed, it is the value",
    )


def achieved_latency() -> Figure:
    """Static router: measured latency against the target, 20 targets from 0.4 to 1."""
    space = _model().space
    reached = [t for t in _TARGETS if t >= _table().predict(space.smallest)]
    specs = [_routed().router.spec(t, _table()) for t in reached]
    full, *times = step_latencies_ms(_model().decoder, [space.full, *specs])
    errors = [abs(ms / full / t - 1) for t, ms in zip(reached, times, strict=True)]
    return Figure(
        name="static router: achieved latency against the target, worst of 20 targets from 0.4 to 1",
        value=max(errors) if len(reached) == len(_TARGETS) else float("inf"),
        unit="relative",
        op="<=",
        bar=0.05,
        spread=median(errors),
        note=f"{len(reached)} of 20 targets within the space's reach ({_table().predict(space.smallest):.2f})",
    )


def against_uniform() -> Figure:
    """Static router against uniform widths at equal measured latency."""
    decoder, space = _model().decoder, _model().space
    _, test = _windows()
    pairs: list[tuple[float, SubnetSpec, list[SubnetSpec]]] = []
    for target in _COMPARED:
        uniform = uniform_within(space, _table(), target)
        pairs.append((target, _routed().router.spec(target, _table()), uniform))
    flat = [s for _, ours, uniform in pairs for s in (ours, *uniform)]
    times = dict(zip(flat, step_latencies_ms(decoder, flat), strict=True))
    wins, notes = 0, []
    for target, ours, uniform in pairs:
        loss = mean_loss(decoder, test, ours)
        # a uniform sub-network that measured slower than ours is no rival at equal latency, but a faster one is
        best = min(mean_loss(decoder, test, s) for s in uniform)
        wins += loss < best
        slowest = max(times[s] for s in uniform)
        notes.append(f"{target:g}: {loss:.3f} against {best:.3f} ({times[ours]:.1f} and {slowest:.1f} ms)")
    return Figure(
        name="static router against uniform widths at equal measured latency: targets with the lower loss",
        value=wins,
        unit=f"of {len(_COMPARED)}",
        op=">=",
        bar=len(_COMPARED),
        note="; ".join(notes),
    )


def surrogate_rank() -> Figure:
    """Surrogate: rank correlation of predicted and true loss on unseen sub-networks."""
    result = _routed()
    return Figure(
        name="surrogate: rank correlation of predicted and true loss on 32 unseen sub-networks",
        value=result.spearman,
        unit="Spearman",
        op=">=",
        bar=0.9,
        note=f"{result.num_measured} sub-networks measured; mean error of the rise's logarithm {result.error:.2f}",
    )


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite("routing", [table_error, achieved_latency, against_uniform, surrogate_rank])

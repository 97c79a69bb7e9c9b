"""Figures of training on several processes, all against the same call on one."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import flextron
from benchmarks.harness import Figure, median
from benchmarks.scale.cost import step_operations
from benchmarks.scale.launch import launched
from benchmarks.scale.worker import medium_run
from tests.toy import prose

__all__ = [
    "curves",
    "curves_of_low_rank",
    "memory",
    "memory_of_low_rank",
    "resumed",
    "resumed_of_low_rank",
    "share_of_peak",
]

_STEPS, _SAVED, _NEXT = 200, 20, 5
_COUNTS = (1, 2, 4)
_RANK = 8


@contextmanager
def _tiny() -> Iterator[Path]:
    """The package's tiny model as an elastic checkpoint, with a text beside it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "elastic"
        text = [prose(60_000)]
        flextron.convert("tiny", calibration=text).save(path)
        (path / "text.txt").write_text(text[0], encoding="utf-8")
        yield path


def _recipe(rank: int | None, steps: int = _STEPS) -> dict[str, Any]:
    """Guided sub-networks, two to a micro batch; four processes share one batch of eight sequences."""
    return {
        "tokens": steps * 8 * 32,
        "context": 32,
        "batch_size": 8,
        "micro_batch_size": 4,
        "lora_rank": rank,
        "checkpoint_minutes": 60,
    }


def _curves(rank: int | None, what: str) -> Figure:
    with _tiny() as model:
        losses = {n: launched("history", n, model=str(model), recipe=_recipe(rank)) for n in _COUNTS}
    apart = {n: max(abs(a - b) for a, b in zip(losses[1], losses[n], strict=True)) for n in _COUNTS if n > 1}
    return Figure(
        name=f"loss curves of {_STEPS} steps on 1, 2 and 4 processes, {what}: furthest apart",
        value=max(apart.values()),
        unit="nats",
        op="<=",
        bar=1e-4,
        peer={"name": "one process, last loss", "value": losses[1][-1]},
        note=f"float32, AdamW, FSDP2 on gloo; {', '.join(f'{n} processes {d:.1e}' for n, d in apart.items())}",
    )


def curves() -> Figure:
    """Loss curves, all weights."""
    return _curves(None, "all weights")


def curves_of_low_rank() -> Figure:
    """Loss curves, low rank."""
    return _curves(_RANK, f"rank {_RANK}")


def _resumed(rank: int | None, what: str) -> Figure:
    recipe = _recipe(rank, _SAVED + _NEXT)
    with _tiny() as model:
        saved = Path(model).with_name("run")
        launched("history", 4, model=str(model), recipe=recipe, run_directory=str(saved), stop=_SAVED)
        following = {}
        for n in (4, 2, 1):
            own = saved.with_name(f"run-{n}")
            shutil.copytree(saved, own)
            following[n] = launched("history", n, model=str(model), recipe=recipe, run_directory=str(own))[_SAVED:]
            assert len(following[n]) == _NEXT
    apart = {n: max(abs(a - b) for a, b in zip(following[4], following[n], strict=True)) for n in (2, 1)}
    return Figure(
        name=f"saved on 4 processes, resumed on 2 and on 1, {what}: next {_NEXT} losses, furthest from those on 4",
        value=max(apart.values()),
        unit="nats",
        op="<=",
        bar=1e-6,
        note=f"saved by Ctrl-C after step {_SAVED}; {', '.join(f'on {n} {d:.1e}' for n, d in apart.items())}",
    )


def resumed() -> Figure:
    """A state of four processes, all weights."""
    return _resumed(None, "all weights")


def resumed_of_low_rank() -> Figure:
    """A state of four processes, low rank."""
    return _resumed(_RANK, f"rank {_RANK}")


def _memory(rank: int | None, what: str) -> Figure:
    one, four = (launched("memory", n, rank=rank) for n in (1, 4))
    ratios = {kind: four[kind] / one[kind] for kind in one}
    return Figure(
        name=f"model and optimizer, {what}: bytes of the fullest of 4 processes over those of 1",
        value=max(ratios["counted"], ratios["live"]),
        unit="ratio",
        op="<=",
        bar=0.3,
        peer={"name": "one process, MB counted", "value": one["counted"] / 1e6},
        note=f"shards counted {ratios['counted']:.3f}; all tensors that live between two steps {ratios['live']:.3f}; "
        f"the process, with what its allocator keeps of the steps' buffers, {ratios['grown']:.3f} "
        f"({four['grown'] / 1e6:.0f} of {one['grown'] / 1e6:.0f} MB)",
    )


def memory() -> Figure:
    """Memory of each process, all weights."""
    return _memory(None, "all weights")


def memory_of_low_rank() -> Figure:
    """Memory of each process, low rank."""
    return _memory(_RANK, f"rank {_RANK}")


def share_of_peak() -> Figure:
    """Operations a second of a training step over those of a large product."""
    run = medium_run(None, tokens=2**16, batch_size=16, micro_batch_size=16)
    operations = step_operations(run.decoder.config, run.recipe)
    weights = torch.randn(2048, 2048)
    rates: dict[str, list[float]] = {"step": [], "product": []}
    for r in range(6):
        start = time.perf_counter()
        run.step(r)
        middle = time.perf_counter()
        for _ in range(10):
            weights @ weights
        end = time.perf_counter()
        if r:
            rates["step"].append(operations / (middle - start))
            rates["product"].append(10 * 2 * 2048**3 / (end - middle))
    spread = median([a / b for a, b in zip(rates["step"], rates["product"], strict=True)])
    return Figure(
        name="elastic training step, one process: counted operations a second over those of a large product",
        value=spread[1],
        unit="ratio",
        op=">=",
        bar=0.4,
        peer={"name": "product of 2048 x 2048 matrices, GFLOP/s", "value": median(rates["product"])[1] / 1e9},
        spread=spread,
        note=f"{median(rates['step'])[1] / 1e9:.0f} GFLOP/s of {operations / 1e9:.0f} GFLOP a step, counted as "
        "docs/scaling.md counts; full networks, float32",
    )

"""Other ways to share a processor: two processes, and training whenever nothing is served."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import smollm2
from benchmarks.coserving.load import (
    Training,
    engine,
    play,
    trainer,
)
from benchmarks.coserving.models import smollm2_decoder
from benchmarks.coserving.sweep import Row, sweeps
from benchmarks.harness import Figure

__all__ = ["heavy_against_others", "light_against_others"]

_TEMPORAL = ((1, 0.0), (1, 3.0), (8, 0.0), (64, 0.0))
"""Optimizer steps of one sequence whenever nothing is served, and rest after them, in times of their length."""


def heavy_against_others() -> Figure:
    """Finetuning against spatial and temporal sharing, heavy load."""
    return _against_others(sweeps()[0].heavy, "heavy", 1.9)


def light_against_others() -> Figure:
    """Finetuning against spatial and temporal sharing, light load: nothing can be more than 1.4 times as fast."""
    return _against_others(sweeps()[0].light, "light", 1.26)


def _against_others(row: Row, name: str, bar: float) -> Figure:
    """The best of the other ways that attains as much as ours, less two requests in a hundred."""
    sweep, decoder = sweeps()[0], smollm2_decoder()
    assert row.beside is not None
    requests = sweep.load[sweep.rows.index(row)]
    found: list[tuple[str, float, float]] = []
    with _beside_in_a_process() as trained:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))
        before, began = trained(), time.monotonic()
        played = play(engine(decoder), requests, sweep.slo, row.seconds)
        found.append(("two processes", played.attainment, (trained() - before) / (time.monotonic() - began)))
        torch.set_num_threads(threads)
    for steps, rest in _TEMPORAL:
        training = Training(trainer(decoder, batch_size=1))
        played = play(
            engine(decoder),
            requests,
            sweep.slo,
            row.seconds,
            training=training,
            steps_when_drained=steps,
            pause=lambda busy, rest=rest: rest * busy,  # type: ignore[misc]
        )
        label = f"{steps} steps when drained" + (f", rest of {rest:g} times their length" if rest else "")
        found.append((label, played.attainment, played.trained))
    wanted = row.beside.attainment - 0.02
    rivals = [f for f in found if f[1] >= wanted]
    best = max(rivals, key=lambda f: f[2]) if rivals else max(found, key=lambda f: f[1])
    return Figure(
        name=f"finetuning beside a {name} load, tokens a second, against the best other way at equal attainment",
        value=row.beside.trained / max(best[2], 1e-9),
        unit="x",
        op=">=",
        bar=bar,
        peer={"name": f"{best[0]}, tokens/s", "value": best[2]},
        note=(
            f"{row.beside.trained:.0f} tokens/s at {row.beside.attainment:.0%}; "
            + ("" if rivals else "no other way attains as much: the one that attains most is compared; ")
            + "; ".join(f"{label}: {attained:.0%}, {tokens:.0f}/s" for label, attained, tokens in found)
        ),
    )


@contextmanager
def _beside_in_a_process() -> Iterator[Callable[[], float]]:
    """Training in a process of its own, with the other half of the threads; tokens so far."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("d", 0.0)
    process = context.Process(target=_train_for_ever, args=(count, max(1, torch.get_num_threads() // 2)), daemon=True)
    process.start()
    while count.value == 0:
        time.sleep(0.1)
    try:
        yield lambda: float(count.value)
    finally:
        process.terminate()
        process.join()


def _train_for_ever(count: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    training = Training(trainer(smollm2.decoder()))
    while True:
        training.run_unit(512)
        count.value = training.num_tokens

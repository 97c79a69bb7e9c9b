"""Decode iterations beside other processes that keep cores busy, and under a limit such as a container has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import mean

from benchmarks.harness import Figure, LeftOutError, print_figures
from benchmarks.llamacpp import LlamaCpp
from benchmarks.serving.models import original
from benchmarks.workload import Decoding, requests

__all__ = ["beside_four", "beside_one", "under_limit"]

_SEQUENCES = (1, 4, 16)
_SECONDS = 6.0
_LIMIT = 1.5
"""Cores' worth of time."""
_PERIOD = 100_000
"""Microseconds."""
_SETTLING = 3.0
"""Seconds before anything counts: the engine finds its number of threads meanwhile."""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def limited(cores: float) -> Iterator[None]:
    """This process with so much of the cores' time, by a control group of its own.

    Raises:
        LeftOutError: control groups cannot be made here.
    """
    root, quota = Path("/sys/fs/cgroup"), int(cores * _PERIOD)
    is_first = (root / "cpu").is_dir()
    parent = root / "cpu" if is_first else root
    group, members = parent / "flextron-bench", parent / "cgroup.procs"
    limits = {"cpu.cfs_quota_us": f"{quota}"} if is_first else {"cpu.max": f"{quota} {_PERIOD}"}
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / name).write_text(value, encoding="ascii")
        (group / members.name).write_text(str(os.getpid()), encoding="ascii")
    except OSError as error:
        raise LeftOutError(f"no control group with a limit can be made: {error}") from error
    try:
        yield
    finally:
        members.write_text(str(os.getpid()), encoding="ascii")
        group.rmdir()


def _mean_seconds(decoding: Decoding) -> float:
    """Mean, not median: a stretch in which nothing runs counts."""
    end = time.perf_counter() + _SETTLING
    while time.perf_counter() < end:
        decoding.step()
    end, times = time.perf_counter() + _SECONDS, []
    while time.perf_counter() < end:
        times.append(decoding.step())
    return mean(times)


@cache
def _times() -> dict[tuple[str, int, int], float]:
    """Seconds of an iteration: who, sequences, busy processes."""
    out = {}
    full = original().widths
    for sequences in _SEQUENCES:
        for adapts in (True, False):
            for count in (0, 1, 4):
                decoding = Decoding(original(), [full] * sequences, adapts_threads=adapts)
                with busy(count):
                    out["adapting" if adapts else "fixed", sequences, count] = _mean_seconds(decoding)
    return out


@cache
def _peer() -> dict[int, float]:
    """llama.cpp's seconds of a token, by busy processes."""
    prompt = requests(1, prompts=(32, 32))[0].prompt
    out = {}
    with LlamaCpp("F32") as peer:
        for count in (0, 1, 4):
            with busy(count):
                end, times = time.perf_counter() + _SECONDS, []
                while time.perf_counter() < end:
                    times.append(peer.step_seconds(prompt, 5))
                out[count] = mean(times)
    return out


def _beside(count: int, bar: float) -> Figure:
    times = _times()
    rises = {n: times["adapting", n, count] / times["fixed", n, 0] for n in _SEQUENCES}
    fixed = {n: times["fixed", n, count] / times["fixed", n, 0] for n in _SEQUENCES}
    worst = max(rises, key=rises.__getitem__)
    peer = _peer()
    each = ", ".join(f"{n}: {rises[n]:.1f} (fixed threads {fixed[n]:.1f})" for n in _SEQUENCES)
    alone = min(times["fixed", n, 0] / times["adapting", n, 0] for n in _SEQUENCES)
    return Figure(
        name=f"decode iteration beside busy processes, {count}, over the same alone; worst of 1, 4, 16 sequences",
        value=rises[worst],
        unit="x",
        op="<=",
        bar=bar,
        peer={"name": "llama.cpp F32, 1 sequence", "value": peer[count] / peer[0]},
        note=f"float32, mean times; by sequences {each}; speed alone over that of fixed threads {alone:.2f}",
    )


def beside_one() -> Figure:
    """Beside one busy process."""
    return _beside(1, 2.2)


def beside_four() -> Figure:
    """Beside four."""
    return _beside(4, 5.0)


def under_limit() -> Figure:
    """Under a limit of 1.5 cores."""
    full = original().widths
    rises, fixed, shares = {}, {}, []
    for n in _SEQUENCES:
        alone, here, steady = (Decoding(original(), [full] * n, adapts_threads=a) for a in (True, True, False))
        before = _mean_seconds(alone)
        with limited(_LIMIT):
            clock, began = time.process_time(), time.perf_counter()
            rises[n] = _mean_seconds(here) / before
            shares.append((time.process_time() - clock) / (time.perf_counter() - began))
            fixed[n] = _mean_seconds(steady) / before
    if max(shares) > 1.1 * _LIMIT:
        raise LeftOutError(f"the limit is not kept here: {max(shares):.2f} cores were used")
    worst = max(rises, key=rises.__getitem__)
    return Figure(
        name=f"decode iteration under a limit of {_LIMIT} cores, over the same without; worst of 1, 4, 16 sequences",
        value=rises[worst],
        unit="x",
        op="<=",
        bar=1.6,
        note=", ".join(f"{n}: {rises[n]:.2f} (fixed threads {fixed[n]:.2f})" for n in _SEQUENCES),
    )


if __name__ == "__main__":
    print_figures([beside_one, beside_four, under_limit])

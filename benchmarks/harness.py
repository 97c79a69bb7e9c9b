"""What all suites share: a figure with its bar, the machine it was measured on, the table, the JSON."""

from __future__ import annotations

import json
import operator
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

__all__ = [
    "Figure",
    "LeftOutError",
    "described",
    "interleaved",
    "interleaved_seconds",
    "largest_difference",
    "median",
    "print_figures",
    "ratios",
    "run_suite",
    "seconds",
]

RESULTS = Path(__file__).parent / "results"
_COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class LeftOutError(Exception):
    """A figure cannot be measured here; says why, and what to install."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number beside its bar."""

    name: str
    value: float
    unit: str
    op: Literal["<=", ">=", "=="]
    bar: float
    peer: dict[str, float | str] | None = None
    """Name and value of what it is measured against, from the same run."""
    spread: tuple[float, float, float] | None = None
    """Smallest, median and largest of the repeats."""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the bar is reached."""
        return _COMPARE[self.op](self.value, self.bar)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors of one shape, over the largest number that is wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """Smallest, median, largest."""
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def interleaved(jobs: dict[str, Callable[[], float]], repeats: int, pause: float = 0.0) -> dict[str, list[float]]:
    """What jobs return, run in turn after one warm-up each, so that drift of the machine hits all alike.

    Args:
        jobs: each measures itself.
        repeats: of each job, the warm-up not counted.
        pause: seconds between jobs, in which the threads of the one before come to rest.
    """
    values: dict[str, list[float]] = {name: [] for name in jobs}
    for r in range(repeats + 1):
        for name, job in jobs.items():
            time.sleep(pause)
            value = job()
            if r:
                values[name].append(value)
    return values


def interleaved_seconds(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time whole jobs in turn, as `interleaved`."""
    return interleaved({name: partial(seconds, job) for name, job in jobs.items()}, repeats)


def seconds(job: Callable[[], object]) -> float:
    """How long a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def ratios(values: dict[str, list[float]], over: str, under: str) -> list[float]:
    """One of two interleaved jobs over the other, round by round."""
    return [a / b for a, b in zip(values[over], values[under], strict=True)]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "unknown"


def described(measure: Callable[[], Figure]) -> str:
    """What a figure is called while it is measured."""
    function = measure.func if isinstance(measure, partial) else measure
    return (function.__doc__ or function.__name__).splitlines()[0].rstrip(".")


def _version(name: str) -> str:
    """A package's version; a tree that runs without being installed has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def print_figures(measures: Sequence[Callable[[], Figure]]) -> None:
    """Measure figures and print a line of each; nothing is written."""
    for measure in measures:
        try:
            figure = measure()
        except LeftOutError as reason:
            print(f"left out: {reason}")
            continue
        rounds = "" if figure.spread is None else f" ({figure.spread[0]:.3g} to {figure.spread[2]:.3g})"
        print(f"{figure.name}: {figure.value:.4g} {figure.unit}{rounds}, bar {figure.op} {figure.bar}; {figure.note}")


def run_suite(suite: str, measures: Sequence[Callable[[], Figure]], results: Path = RESULTS) -> bool:
    """Measure every figure, print the table, write the JSON into `results`; whether all hold and none failed."""
    gpu = torch.cuda.is_available()
    figures, left_out, has_failed = [], dict[str, str](), False
    console = Console(width=140)
    for measure in measures:
        title = described(measure)
        console.print(f"measuring: {title}")
        try:
            figures.append(measure())
            console.print(f"  {figures[-1].value:.4g} {figures[-1].unit}; {figures[-1].note}")
        except LeftOutError as reason:
            console.print(f"left out: {reason}")
            left_out[title] = str(reason)
        except Exception as error:  # the figures before it took minutes
            console.print_exception()
            left_out[title] = f"failed: {error!r}"
            has_failed = True
    table = Table(title=f"{suite}: figures and bars", title_justify="left")
    for column in ("figure", "value", "bar", "holds", "peer", "note"):
        table.add_column(column)
    for f in figures:
        peer = f"{f.peer['name']}: {f.peer['value']:.4g}" if f.peer else ""
        table.add_row(f.name, f"{f.value:.4g} {f.unit}", f"{f.op} {f.bar:g}", "yes" if f.holds else "NO", peer, f.note)
    console.print(table)
    results.mkdir(exist_ok=True)
    result = {
        "suite": suite,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "versions": {name: _version(name) for name in ("flextron", "torch", "transformers")},
        "figures": [asdict(f) | {"holds": f.holds} for f in figures],
        "left_out": left_out,
    }
    path = results / f"{suite}{'-gpu' if gpu and suite != 'gpu' else ''}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return all(f.holds for f in figures) and not has_failed

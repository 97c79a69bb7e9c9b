"""The scale suite: the same training on one, two and four processes, its states, and what each process holds.

Processes are started by `torchrun` on this machine and talk by gloo.
"""

from __future__ import annotations

from benchmarks.harness import run_suite
from benchmarks.scale.simulated import agreement, day_of_many
from benchmarks.scale.training import (
    curves,
    curves_of_low_rank,
    memory,
    memory_of_low_rank,
    resumed,
    resumed_of_low_rank,
    share_of_peak,
)

__all__ = ["run"]


def run() -> bool:
    """All figures of the suite."""
    return run_suite(
        "scale",
        [
            curves,
            curves_of_low_rank,
            resumed,
            resumed_of_low_rank,
            memory,
            memory_of_low_rank,
            share_of_peak,
            agreement,
            day_of_many,
        ],
    )

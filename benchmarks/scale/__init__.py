"""The scale suite: training on one, two and four processes, its states; serving on two ranks, and on replicas.

Processes run on this machine and talk by gloo; those that train are started by `torchrun`.
"""

from __future__ import annotations

from benchmarks.harness import run_suite
from benchmarks.scale.replicas import back_after_a_kill, failed_in_an_update, lost_in_a_kill
from benchmarks.scale.serving import collectives_of_layers, same_answers
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
            same_answers,
            collectives_of_layers,
            agreement,
            day_of_many,
            lost_in_a_kill,
            back_after_a_kill,
            failed_in_an_update,
        ],
    )

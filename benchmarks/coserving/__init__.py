"""The co-serving suite: exact gradients, memory, finetuning alone and beside a recorded load, and other ways to share.

On SmolLM2-135M, float32, two threads or as many as PyTorch has; the sweep also on the package's tiny model. A load is
stated as a share of the requests a second that the engine answers when all are there at once.
"""

from __future__ import annotations

import torch

from benchmarks.coserving.alone import instruct_throughput, peak_throughput, saved_bytes
from benchmarks.coserving.exactness import gradients, same_answers, same_curve
from benchmarks.coserving.fairness import fair_jobs
from benchmarks.coserving.others import heavy_against_others, light_against_others
from benchmarks.coserving.sweep import kept_attainment, kept_light, kept_throughput
from benchmarks.harness import run_suite

__all__ = ["run"]


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite(
        "coserving",
        [
            gradients,
            same_curve,
            same_answers,
            saved_bytes,
            peak_throughput,
            instruct_throughput,
            kept_throughput,
            kept_attainment,
            kept_light,
            heavy_against_others,
            light_against_others,
            fair_jobs,
        ],
    )

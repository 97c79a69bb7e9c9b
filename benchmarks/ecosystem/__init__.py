"""The ecosystem suite: exports that run elsewhere, peft's adapters, answers of a given form, vectors, keys of requests.

On SmolLM2-135M, the package's tiny model, and tiny random models of each family.
"""

from __future__ import annotations

import torch

from benchmarks.ecosystem.exports import families_in_llamacpp, heterogeneous_gguf, round_trips
from benchmarks.ecosystem.peers import adapters_of_peft, vectors_of_transformers
from benchmarks.ecosystem.structured import grammar_cost, valid_answers
from benchmarks.ecosystem.surface import unknown_keys
from benchmarks.harness import run_suite

__all__ = ["run"]


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite(
        "ecosystem",
        [
            heterogeneous_gguf,
            families_in_llamacpp,
            round_trips,
            adapters_of_peft,
            vectors_of_transformers,
            unknown_keys,
            valid_answers,
            grammar_cost,
        ],
    )

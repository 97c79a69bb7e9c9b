"""The ecosystem suite: exports that run elsewhere, adapters, clients, lm-eval, answers of a given form, keys.

On SmolLM2-135M, the package's tiny model, and tiny random models of each family.
"""

from __future__ import annotations

import torch

from benchmarks.ecosystem.elsewhere import clients, oldest_transformers, onnx_and_openvino
from benchmarks.ecosystem.evaluation import likelihoods_through_the_server
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
            oldest_transformers,
            onnx_and_openvino,
            adapters_of_peft,
            vectors_of_transformers,
            likelihoods_through_the_server,
            clients,
            unknown_keys,
            valid_answers,
            grammar_cost,
        ],
    )

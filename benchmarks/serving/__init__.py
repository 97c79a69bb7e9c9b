"""The serving suite: exactness, decode speed, throughput beside transformers and llama.cpp, mixed batches, memory.

All on SmolLM2-135M and two threads or as many as PyTorch has. Sub-networks are those of the demo.
"""

from __future__ import annotations

import torch

from benchmarks.harness import run_suite
from benchmarks.serving.decode import (
    bandwidth,
    float32_against_llamacpp,
    int4_against_llamacpp,
    int8_against_llamacpp,
    self_speculation,
)
from benchmarks.serving.eight_bits import batch_of_16, batch_of_64, products, prompt, rounded_tokens
from benchmarks.serving.head import equal_tokens, screened_head
from benchmarks.serving.iteration import batch_cost, overhead
from benchmarks.serving.neighbours import beside_four, beside_one, under_limit
from benchmarks.serving.prompts import (
    long_prompt_float32,
    long_prompt_int8,
    over_products,
    prompt_float32,
    prompt_int8,
)
from benchmarks.serving.subnetworks import kv_memory, mixed_batch, small_mixed_batch, subnet_time
from benchmarks.serving.throughput import (
    exact_tokens,
    throughput_against_llamacpp,
    throughput_against_transformers,
    throughput_int8_against_llamacpp,
)

__all__ = ["run"]


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite(
        "serving",
        [
            exact_tokens,
            bandwidth,
            float32_against_llamacpp,
            int8_against_llamacpp,
            int4_against_llamacpp,
            throughput_against_transformers,
            throughput_against_llamacpp,
            throughput_int8_against_llamacpp,
            subnet_time,
            mixed_batch,
            small_mixed_batch,
            self_speculation,
            batch_of_16,
            batch_of_64,
            prompt,
            prompt_float32,
            long_prompt_float32,
            prompt_int8,
            long_prompt_int8,
            over_products,
            products,
            rounded_tokens,
            screened_head,
            equal_tokens,
            kv_memory,
            overhead,
            batch_cost,
            beside_one,
            beside_four,
            under_limit,
        ],
    )

"""Prompts: beside llama.cpp, and beside what PyTorch takes for their products alone."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks import smollm2
from benchmarks.harness import Figure, interleaved, interleaved_seconds, median, print_figures, ratios
from benchmarks.llamacpp import Kind, LlamaCpp
from benchmarks.serving.models import PAUSE, matrices, original
from flextron.engine import EngineCore, EngineSettings
from flextron.generation.sampling import SamplingParams
from flextron.kernels.decoder import Weights

__all__ = [
    "long_prompt_float32",
    "long_prompt_int8",
    "over_products",
    "prompt_core",
    "prompt_float32",
    "prompt_int8",
    "prompt_seconds",
]

_ROUNDS = 5
_CHUNK = 512


def prompt_core(weights: Weights) -> EngineCore:
    """An engine that computes up to 512 tokens of a prompt in an iteration, on all threads."""
    settings = EngineSettings(
        weights=weights, max_num_batched_tokens=_CHUNK, prefix_caching=False, adapts_threads=False, kv_cache_gb=0.5
    )
    return EngineCore(original(), settings)


def prompt_seconds(core: EngineCore, length: int) -> float:
    """Time of a prompt and the first token after it."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    start = time.perf_counter()
    core.add("a", _tokens(length), params, core.network(core.decoder.widths))
    while core.has_unfinished:
        core.step()
    return time.perf_counter() - start


def _tokens(length: int) -> list[int]:
    tokens: list[int] = smollm2.eval_sequences(length, length)[0].tolist()
    return tokens


def _against_llamacpp(weights: Weights, kind: Kind, length: int, bar: float) -> Figure:
    core = prompt_core(weights)
    with LlamaCpp(kind, slot_tokens=length + 64) as peer:
        jobs = {"ours": partial(prompt_seconds, core, length), "peer": partial(peer.prompt_seconds, _tokens(length))}
        times = interleaved(jobs, _ROUNDS, PAUSE)
    spread = median(ratios(times, "peer", "ours"))
    return Figure(
        name=f"prompt of {length:,} tokens, {weights}, against llama.cpp's {kind}",
        value=spread[1],
        unit="x",
        op=">=",
        bar=bar,
        peer={"name": f"llama.cpp {kind}, tokens/s", "value": length / median(times["peer"])[1]},
        spread=spread,
        note=f"{length / median(times['ours'])[1]:.0f} tokens/s; llama.cpp compiled for {peer.features}",
    )


def prompt_float32() -> Figure:
    """A prompt of 512 tokens in float32 against llama.cpp."""
    return _against_llamacpp("float32", "F32", 512, 1.2)


def long_prompt_float32() -> Figure:
    """A prompt of 2,048 tokens in float32 against llama.cpp."""
    return _against_llamacpp("float32", "F32", 2048, 1.2)


def prompt_int8() -> Figure:
    """A prompt of 512 tokens in int8 against llama.cpp."""
    return _against_llamacpp("int8", "Q8_0", 512, 1.5)


def long_prompt_int8() -> Figure:
    """A prompt of 2,048 tokens in int8 against llama.cpp."""
    return _against_llamacpp("int8", "Q8_0", 2048, 1.5)


def over_products(length: int = 512) -> Figure:
    """A prompt of 512 tokens against its products alone, as PyTorch multiplies."""
    core, weights = prompt_core("float32"), matrices()
    inputs = {m.shape[1]: torch.randn(length, m.shape[1]) for m in weights}
    config = original().config
    heads = torch.randn(1, config.num_attention_heads, length, config.head_dim)

    def products() -> None:
        for matrix in weights:
            F.linear(inputs[matrix.shape[1]], matrix)

    def attention() -> None:
        for _ in original().layers:
            F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    jobs = {"ours": partial(prompt_seconds, core, length), "products": products, "attention": attention}
    times = interleaved_seconds(jobs, _ROUNDS)
    limit = [a + b for a, b in zip(times["products"], times["attention"], strict=True)]
    spread = median([ours / both for ours, both in zip(times["ours"], limit, strict=True)])
    operations = 2 * length * sum(m.numel() for m in weights)
    return Figure(
        name=f"time of a prompt of {length} tokens, float32, over PyTorch's for its products and attention alone",
        value=spread[1],
        unit="x",
        op="<=",
        bar=1.1,
        peer={"name": "products and attention, ms", "value": 1e3 * median(limit)[1]},
        spread=spread,
        note=(
            f"products {1e3 * median(times['products'])[1]:.0f} ms, "
            f"{operations / median(times['products'])[1] / 1e9:.0f} GFLOP/s; attention "
            f"{1e3 * median(times['attention'])[1]:.0f} ms; ours {1e3 * median(times['ours'])[1]:.0f} ms"
        ),
    )


if __name__ == "__main__":
    print_figures([prompt_float32, long_prompt_float32, prompt_int8, long_prompt_int8, over_products])

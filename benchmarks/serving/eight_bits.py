"""Eight-bit weights in whole numbers: batches, a prompt and single products beside float32, and what rounding costs."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Figure, interleaved, interleaved_seconds, median, print_figures, ratios
from benchmarks.rounding import compiled_perplexity, perplexity
from benchmarks.serving.models import PAUSE, ROUNDS, original
from benchmarks.serving.prompts import prompt_core, prompt_seconds
from benchmarks.workload import Decoding
from flextron.kernels.decoder import Weights
from flextron.kernels.panels import Panels
from flextron.kernels.quantization import quantize_rows

__all__ = ["batch_of_16", "batch_of_64", "products", "prompt", "rounded_tokens"]

_BOTH: tuple[Weights, ...] = ("float32", "int8")


def batch_of_16() -> Figure:
    """A decode iteration of 16 sequences, int8 against float32."""
    return _batch(16)


def batch_of_64() -> Figure:
    """A decode iteration of 64 sequences, int8 against float32."""
    return _batch(64)


def _batch(count: int) -> Figure:
    full = original().widths
    jobs = {w: Decoding(original(), [full] * count, w).step_seconds for w in _BOTH}
    times = interleaved(jobs, ROUNDS, PAUSE)
    return _against_float32(f"decode iteration of {count} sequences, int8 against float32", times, count)


def prompt() -> Figure:
    """A prompt of 512 tokens, int8 against float32."""
    length = 512
    cores = {w: prompt_core(w) for w in _BOTH}
    times = interleaved({w: partial(prompt_seconds, cores[w], length) for w in _BOTH}, 5, PAUSE)
    return _against_float32(f"prompt of {length} tokens, int8 against float32", times, length)


def _against_float32(name: str, times: dict[str, list[float]], tokens: int) -> Figure:
    spread = median(ratios(times, "float32", "int8"))
    rates = {w: tokens / median(times[w])[1] for w in _BOTH}
    return Figure(
        name=name,
        value=spread[1],
        unit="x",
        op=">=",
        bar=2.5,
        peer={"name": "float32, tokens/s", "value": rates["float32"]},
        spread=spread,
        note=f"{rates['int8']:.0f} tokens/s; whole head in both",
    )


def products(tokens: int = 64) -> Figure:
    """Products of 64 tokens with a matrix of SmolLM2's, rounding included, against PyTorch's in float32."""
    down = original().layers[0].mlp.down.weight.t().contiguous()
    panels, x = Panels.of(down), torch.randn(tokens, down.shape[1])
    numbers, whole = quantize_rows(down)[0].t(), torch.randint(-127, 128, x.shape, dtype=torch.int8)
    jobs = {
        "ours": partial(panels.multiply, x),
        "float32": lambda: x @ down.t(),
        "int8 by PyTorch": lambda: torch._int_mm(whole, numbers),
    }
    times = interleaved_seconds({n: lambda job=job: [job() for _ in range(20)] for n, job in jobs.items()}, ROUNDS)
    spread = median(ratios(times, "float32", "ours"))
    rates = {n: 20 * tokens * down.numel() / median(t)[1] / 1e9 for n, t in times.items()}
    return Figure(
        name=f"products of {tokens} tokens in whole numbers, rounding included, against PyTorch's in float32",
        value=spread[1],
        unit="x",
        op=">=",
        bar=2.5,
        peer={"name": "float32, billion products/s", "value": rates["float32"]},
        spread=spread,
        note=f"{down.shape[1]} x {down.shape[0]}; ours {rates['ours']:.0f} billion/s; PyTorch's `_int_mm`, of numbers "
        f"that are rounded already, {rates['int8 by PyTorch']:.0f}",
    )


def rounded_tokens() -> Figure:
    """Perplexity of the compiled iteration in int8 over that of its rounded weights alone."""
    found = {w: (perplexity(original(), w), compiled_perplexity(original(), w)) for w in ("int8", "int4")}
    alone, compiled = found["int8"]
    return Figure(
        name="perplexity in int8, tokens rounded as well, over that of the rounded weights alone",
        value=compiled / alone,
        unit="ratio",
        op="<=",
        bar=1.005,
        peer={"name": "rounded weights alone, perplexity", "value": alone},
        note=f"perplexity {compiled:.3f}; int4: {found['int4'][1]:.3f} against {found['int4'][0]:.3f}",
    )


if __name__ == "__main__":
    print_figures([products, batch_of_16, batch_of_64, prompt, rounded_tokens])

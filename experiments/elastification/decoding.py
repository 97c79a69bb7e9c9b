"""Milliseconds of a decode step, sub-networks and precisions in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import median
from time import perf_counter

from flextron import SamplingParams
from flextron.engine import EngineCore, EngineSettings
from flextron.kernels.layout import Weights
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["decode_ms"]

_PROMPT = tuple(range(100, 164))


def decode_ms(
    decoder: Decoder, networks: Sequence[tuple[SubnetSpec, Weights]], *, num_tokens: int = 24, rounds: int = 5
) -> list[float]:
    """Median time between two tokens of one greedy answer in the engine.

    Args:
        decoder: the full, frozen model.
        networks: sub-networks with the precision of their weights.
        num_tokens: tokens of an answer.
        rounds: how often each network has its turn, so that drift of the machine hits all alike.
    """

    @cache
    def core(weights: Weights) -> EngineCore:
        return EngineCore(decoder, EngineSettings(weights=weights, kv_cache_gb=0.1, prefix_caching=False))

    times: list[list[float]] = [[] for _ in networks]
    for _ in range(rounds):
        for (spec, weights), own in zip(networks, times, strict=True):
            own += _answer(core(weights), spec, num_tokens)
    return [1e3 * median(own) for own in times]


def _answer(core: EngineCore, spec: SubnetSpec, num_tokens: int) -> list[float]:
    core.add("a", _PROMPT, SamplingParams(max_tokens=num_tokens), core.network(spec))
    core.step()  # reads the prompt
    seconds = []
    while core.has_unfinished:
        began = perf_counter()
        core.step()
        seconds.append(perf_counter() - began)
    return seconds

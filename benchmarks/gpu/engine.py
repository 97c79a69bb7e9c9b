"""The engine of the GPU suite, and prompts for it."""

from __future__ import annotations

import random
from functools import cache

from benchmarks.gpu.models import decoder, setting
from flextron.engine import EngineCore, EngineSettings
from flextron.model.decoder import Decoder

__all__ = ["core", "engine_of", "prompt"]


def prompt(count: int, seed: int, small: bool = False) -> list[int]:
    """Tokens drawn at random."""
    vocabulary = (setting().small if small else setting().shape)["vocab_size"]
    rng = random.Random(seed)
    return [rng.randrange(1, vocabulary) for _ in range(count)]


def engine_of(ours: Decoder) -> EngineCore:
    """An engine with room for all rows."""
    room = max(setting().prompts) + max(setting().batches)
    settings = EngineSettings(
        kv_cache_gb=setting().kv_cache_gb,
        max_num_seqs=max(64, max(setting().batches)),
        max_num_batched_tokens=max(256, room),
        prefix_caching=False,
        native=False,  # a rehearsal runs what a GPU runs
    )
    return EngineCore(ours, settings)


@cache
def core() -> EngineCore:
    """The engine that all rows of speed share, and its graphs with it."""
    return engine_of(decoder())

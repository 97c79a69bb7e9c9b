"""Generation by transformers, beside which the GPU suite measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.gpu.models import peer
from flextron.model.device import wait_for

__all__ = ["generate", "greedy"]


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(prompts: Sequence[Sequence[int]], count: int, *, compiles: bool) -> list[float]:
    """Seconds between transformers' tokens with a static cache, all prompts of one length or padded on the left."""
    if compiles:
        torch.compiler.reset()  # else the next batch is compiled for sizes of any kind
    theirs, clock, length = peer(), _Clock(), max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=theirs.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=theirs.device)
    theirs.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        cache_implementation="static",
        disable_compile=not compiles,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]


@torch.no_grad()
def greedy(tokens: Sequence[int], count: int) -> list[int]:
    """By running the whole text again for each token."""
    theirs, text = peer(small=True), list(tokens)
    for _ in range(count):
        text.append(int(theirs(torch.tensor([text], device=theirs.device), use_cache=False).logits[0, -1].argmax()))
    return text[len(tokens) :]

"""How the next token is chosen: the settings of a request, and drawing from scores.

Scores are changed in vLLM's order: `processors` first (what needs the tokens so far), then temperature, `min_p`,
`top_k` and `top_p`. Each step computes what the processor of `transformers` of the same name computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flextron.errors import FlextronError

__all__ = ["SamplingParams", "most_likely", "probabilities", "sample"]

_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 64
    """New tokens at most; 0 computes the prompt alone, for its scores."""
    min_tokens: int = 0
    """New tokens before a stop token may come, or a stop string counts."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of most likely tokens that holds this much probability; the rest is never drawn."""
    top_k: int = 0
    """So many most likely tokens; the rest is never drawn. 0 is off."""
    min_p: float = 0.0
    """Tokens less likely than this fraction of the likeliest one's probability are never drawn."""
    repetition_penalty: float = 1.0
    """Divides positive scores of the tokens in prompt and answer, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Is taken from the scores of the tokens in the answer."""
    frequency_penalty: float = 0.0
    """Is taken from the scores of the tokens in the answer, once for each time they are there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Is added to the scores of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens may come; None for all."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that must not come: the last token of one is never chosen after the others."""
    seed: int | None = None
    """Seed of the sampling; None takes PyTorch's global generator."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence; they are not returned."""
    logprobs: int | None = None
    """Most likely tokens that the engine reports at each position, beside the chosen one; None for neither."""
    prompt_logprobs: int | None = None
    """The same for the positions of the prompt."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise FlextronError(f"{name} must be at least 0, not {value}")
        if self.min_tokens > self.max_tokens:
            raise FlextronError(f"min_tokens ({self.min_tokens}) must be at most max_tokens ({self.max_tokens})")
        if not 0 <= self.temperature < float("inf"):
            raise FlextronError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise FlextronError(f"seed must have at most 63 bits and a sign, not be {self.seed}")
        if not 0 < self.top_p <= 1:
            raise FlextronError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise FlextronError(f"min_p must lie in [0, 1], not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise FlextronError(f"repetition_penalty must be a number above 0, not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise FlextronError(f"{name} must be a number, not {getattr(self, name)}")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise FlextronError("logit_bias must hold numbers")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise FlextronError("allowed_token_ids is empty; give at least one token, or None for all")
        if not all(self.bad_words_ids):
            raise FlextronError("a sequence of bad_words_ids is empty; give at least one token")

    @property
    def processes(self) -> bool:
        """Whether `processors` have anything to do."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.bad_words_ids
            or self.allowed_token_ids is not None
        )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether only the largest logit at each position matters."""
        return self.temperature == 0 and self.logprobs is None and self.prompt_logprobs is None and not self.processes

    @property
    def named_tokens(self) -> set[int]:
        """All tokens that the settings name, which the vocabulary must have."""
        words = {token for word in self.bad_words_ids for token in word}
        return {*self.logit_bias, *(self.allowed_token_ids or ()), *words}


def probabilities(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """What tokens are drawn from, (B, V), at a temperature above 0; not quite normalised where something is cut."""
    logits_BV = logits_BV.float()
    # from the largest down, and by no less than float32 holds: else a tiny temperature divides infinities
    z_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(params.temperature, _LEAST_TEMPERATURE)
    if params.min_p > 0:
        p = torch.softmax(z_BV, -1)
        z_BV = z_BV.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), -torch.inf)
    if 0 < params.top_k < z_BV.shape[-1]:
        z_BV = z_BV.masked_fill(z_BV < z_BV.topk(params.top_k).values[:, -1:], -torch.inf)
    p = torch.softmax(z_BV, -1)
    if params.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        # a token stays while the tokens before it hold less than top_p
        before = ordered.cumsum(-1) - ordered
        before[:, 0] = -1.0  # the first one always stays, however small top_p is
        ordered[before >= params.top_p] = 0
        p = torch.zeros_like(p).scatter_(-1, order, ordered)
    return p


def most_likely(logits_BV: Tensor) -> Tensor:
    """Token ids, (B,). NumPy finds the largest of many numbers in a small part of PyTorch's time on a CPU."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))
    return logits_BV.argmax(-1)


def sample(logits_BV: Tensor, params: SamplingParams, generator: torch.Generator | None) -> Tensor:
    """Next token ids, (B,)."""
    if params.temperature == 0:
        return most_likely(logits_BV)
    return torch.multinomial(probabilities(logits_BV, params), 1, generator=generator).squeeze(-1)

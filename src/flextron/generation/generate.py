"""Plain generation with a KV cache, for a handful of prompts; the engine is for more than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.generation.decoding import Steps
from flextron.generation.prompts import check_prompt
from flextron.model.batch import TokenChoice
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["SamplingParams", "generate"]

_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 64
    """New tokens at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of most likely tokens that holds this much probability; the rest is never drawn."""
    seed: int | None = None
    """Seed of the sampling; None takes PyTorch's global generator."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence; they are not returned."""
    logprobs: int | None = None
    """Most likely tokens that the engine reports at each position, beside the chosen one; None for neither."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_tokens < 1:
            raise FlextronError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise FlextronError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise FlextronError(f"seed must have at most 63 bits and a sign, not be {self.seed}")
        if self.logprobs is not None and self.logprobs < 0:
            raise FlextronError(f"logprobs must be at least 0, not {self.logprobs}")
        if not 0 < self.top_p <= 1:
            raise FlextronError(f"top_p must lie in (0, 1], not {self.top_p}")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether only the largest logit at each position matters."""
        return self.temperature == 0 and self.logprobs is None


def probabilities(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """What tokens are drawn from, (B, V), at a temperature above 0; not quite normalised where `top_p` cuts."""
    logits_BV = logits_BV.float()
    # from the largest down, and by no less than float32 holds: else a tiny temperature divides infinities
    p = torch.softmax((logits_BV - logits_BV.amax(-1, keepdim=True)) / max(params.temperature, _LEAST_TEMPERATURE), -1)
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


@torch.inference_mode()
def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    spec: SubnetSpec,
    params: SamplingParams,
    router: TokenChoice | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, iteration by iteration; finished ones go on (the caller cuts).

    Args:
        decoder: the model.
        prompts: token ids of each.
        spec: the sub-network.
        params: how tokens are chosen.
        router: chooses the MLP width of each token, of prompts and answers; by default all have the spec's.

    Raises:
        FlextronError: the model cannot continue a prompt (`check_prompt`), or the router is of another model.
    """
    if not prompts:
        return
    if router is not None:
        router.check(decoder.config, spec)
    for prompt in prompts:
        check_prompt(decoder.config, prompt, params.max_tokens)
    longest = max(len(p) for p in prompts) + params.max_tokens
    device = decoder.device
    generator = None if params.seed is None else torch.Generator(device).manual_seed(params.seed)
    steps = Steps(decoder, spec, len(prompts), longest, router)
    new = [torch.tensor(p, device=device) for p in prompts]
    starts = [0] * len(prompts)
    for _ in range(params.max_tokens):
        tokens = sample(steps.run(new, starts), params, generator)
        starts = [a + len(t) for a, t in zip(starts, new, strict=True)]
        new = list(tokens.unsqueeze(1))
        yield tokens.tolist()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    spec: SubnetSpec,
    params: SamplingParams,
    router: TokenChoice | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, without the stop token; arguments as for `stream`.

    Raises:
        FlextronError: as for `stream`.
    """
    out: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for tokens in stream(decoder, prompts, spec, params, router):
        for i in sorted(running):
            if tokens[i] in params.stop_token_ids:
                running.discard(i)
            else:
                out[i].append(tokens[i])
        if not running:
            break
    return out

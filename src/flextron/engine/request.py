"""A request inside the engine: its tokens, how far they are computed, and where its keys and values lie."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from flextron.engine.pages import Page
from flextron.engine.pooling import Pooled
from flextron.engine.scores import Logprobs, prompt_logprobs
from flextron.generation.constraints import Constraint
from flextron.generation.processors import processed
from flextron.generation.sampling import SamplingParams
from flextron.model.adapter import Adapter
from flextron.model.batch import TokenChoice
from flextron.spec import SubnetSpec

__all__ = ["Chunk", "FinishReason", "Network", "Request"]


class FinishReason(str, Enum):
    """Why a request ended; values as OpenAI has them, where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, eq=False)
class Network:
    """A sub-network as the engine runs it, made once for all requests that use it."""

    spec: SubnetSpec
    router: TokenChoice | None
    adapter: Adapter | None
    """What stands beside its linears."""
    layout: SubnetSpec
    """The sub-network for which its requests' pages have room: the same, or the one that they began in."""
    num_blocks: int
    """Blocks of a page: KV heads of all layers."""
    block_offsets: tuple[int, ...]
    """First block of each layer."""
    key: bytes
    """Start of its pages' keys: pages of different networks are never shared."""


@dataclass(eq=False)
class Request:
    """One request."""

    request_id: str
    tokens: list[int]
    """Prompt and answer."""
    num_prompt: int
    network: Network
    params: SamplingParams
    generator: torch.Generator | None = None
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache."""
    pages: list[Page] = field(default_factory=list)
    block_table: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))
    """Blocks of the pages, (capacity in pages, blocks of a page)."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of the leading full pages, as far as they were asked for."""
    has_mixed_pages: bool = False
    """Whether pages may hold what two networks computed; such pages are shared with nobody."""
    constraint: Constraint | None = None
    """The grammar that the answer follows, if there is one; this request's own."""
    pooled: Pooled | None = None
    """The prompt's vector, which is wanted in the place of an answer."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens after the first, if asked for, as far as they are computed."""
    mlp_share: float | None = None
    """With a token router, the share of the full model's MLP neurons that the last token ran through."""
    num_cached_tokens: int | None = None
    """Tokens that were found in the cache when it first ran."""
    started: float | None = None
    """When it first ran, by `time.monotonic`."""
    finish_reason: FinishReason | None = None
    arrived: float = field(default_factory=time.monotonic)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.tokens)

    @property
    def num_new(self) -> int:
        """Tokens still to compute; 1 while it decodes."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def answer(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def computes_prompt(self) -> bool:
        """Whether all tokens of the prompt must run, also those whose keys and values are in the cache."""
        return self.scores_prompt or (self.pooled is not None and self.pooled.needs_all)

    def score_prompt(self, start: int, logits_TV: Tensor) -> None:
        """Take log-probabilities of the prompt's next tokens from the scores after those from `start` on."""
        done, count = len(self.prompt_logprobs), self.params.prompt_logprobs
        tokens = self.tokens[done + 1 : min(start + len(logits_TV) + 1, self.num_prompt)]
        assert count is not None
        # a request that starts over comes by tokens that it has scored
        self.prompt_logprobs += prompt_logprobs(logits_TV[done - start :][: len(tokens)], tokens, count)

    def choice_scores(self, logits_TV: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """Scores as the choice of the next token sees them.

        Args:
            logits_TV: the model's scores; the last ones are those after all drafted tokens.
            drafted: tokens after the request's own.
        """
        if not self.params.processes and self.constraint is None:
            return logits_TV
        first, prompt, answer = len(drafted) + 1 - len(logits_TV), self.tokens[: self.num_prompt], self.answer
        masks = [None] * len(logits_TV) if self.constraint is None else self.constraint.masks(drafted, first)
        rows = [
            processed(logits_V, self.params, prompt, [*answer, *drafted[: first + i]], mask_V)
            for i, (logits_V, mask_V) in enumerate(zip(logits_TV, masks, strict=True))
        ]
        return torch.stack(rows)

    def add_page(self, page: Page) -> None:
        """Append a page to the block table."""
        if len(self.pages) == len(self.block_table):
            grown = torch.empty(max(4, 2 * len(self.block_table)), max(1, self.network.num_blocks), dtype=torch.int32)
            grown[: len(self.block_table)] = self.block_table if len(self.block_table) else grown[:0]
            self.block_table = grown
        self.block_table[len(self.pages), : len(page.blocks)] = torch.tensor(page.blocks, dtype=torch.int32)
        self.pages.append(page)


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Consecutive tokens of a request that one iteration computes."""

    request: Request
    start: int
    """Position of the first; all before it are in the cache."""
    tokens: list[int]
    network: Network
    """What they run in: the request's own, or one nested in it that uses the same pages."""
    num_logits: int
    """After how many of the tokens, counted from the last, the scores over the vocabulary are wanted."""
    num_hidden: int = 0
    """After how many, counted the same way, the final hidden states are wanted."""

    @property
    def needs_all_logits(self) -> bool:
        """Whether more than the largest logit matters."""
        return self.request.constraint is not None or not self.request.params.is_plain_greedy

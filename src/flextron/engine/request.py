"""A request inside the engine: its tokens, how far they are computed, and where its keys and values lie."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from flextron.engine.pages import Page
from flextron.generation.generate import SamplingParams
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
    finish_reason: FinishReason | None = None
    arrived: float = field(default_factory=time.monotonic)

    @property
    def num_new(self) -> int:
        """Tokens still to compute; 1 while it decodes."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def answer(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_prompt :]

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

    @property
    def needs_all_logits(self) -> bool:
        """Whether more than the largest logit matters."""
        return not self.request.params.is_plain_greedy

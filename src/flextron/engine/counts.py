"""What the scheduler and the co-serving policy know of requests and of an engine: counts and times, nothing else.

Tokens, tensors and grammars are the engine's own. So the same scheduling code also serves a simulation, whose requests
are numbers and whose iterations take as long as a model of a machine says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from flextron.engine.pages import Page

__all__ = ["CountedNetwork", "CountedRequest", "R"]


class CountedNetwork(Protocol):
    """What pages of a sub-network's requests need."""

    @property
    def num_blocks(self) -> int:
        """Blocks of a page."""

    @property
    def key(self) -> bytes:
        """Start of its pages' keys."""


class CountedRequest(Protocol):
    """A request, as far as the scheduler sees it; `engine/request.py` explains the fields."""

    num_computed_tokens: int
    pages: list[Page]
    keys: list[bytes]
    has_mixed_pages: bool
    num_cached_tokens: int | None
    started: float | None

    @property
    def network(self) -> CountedNetwork:
        """What it runs in."""

    @property
    def arrived(self) -> float:
        """When it came, in seconds of the engine's clock."""

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer; asked for where pages of equal prompts are shared."""

    @property
    def num_tokens(self) -> int:
        """How many there are."""

    @property
    def num_new(self) -> int:
        """Tokens still to compute; 1 while it decodes."""

    @property
    def computes_prompt(self) -> bool:
        """Whether all tokens of the prompt must run."""

    def add_page(self, page: Page, /) -> None:
        """Take one more page."""


R = TypeVar("R", bound=CountedRequest)

"""What a client saw of one request, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Timeline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """One request from its scheduled arrival to its end. Times are seconds on one clock that starts with the load."""

    index: int
    """Number of the request in order of arrival."""
    target: str | None = None
    """Suffix of the model's name."""
    scheduled_s: float
    """When it was to arrive."""
    sent_s: float
    """When the client got around to sending it."""
    end_s: float
    """When the stream ended, or failed."""
    chunk_s: tuple[float, ...] = ()
    """When each piece of text came; pieces that came together have the same time."""
    prompt_tokens: int
    """Prompt tokens as the server counted them, or as asked for."""
    wanted_tokens: int
    """Output tokens asked for, at most."""
    usage_tokens: int | None = None
    """Output tokens as the server counted them, if it did."""
    error: str | None = None
    """Kind of failure."""
    detail: str = ""
    """The failure in the server's or the library's words."""

    @property
    def output_tokens(self) -> int:
        """Output tokens as the server counted them, otherwise one for each piece of text."""
        return len(self.chunk_s) if self.usage_tokens is None else self.usage_tokens

    @property
    def late_s(self) -> float:
        """Seconds between scheduled arrival and sending: the client's part of the wait."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the scheduled arrival to the first text, all queueing included."""
        return self.chunk_s[0] - self.scheduled_s if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first: (t_last - t_first)/(N - 1).

        None where nothing can be measured: with less than two tokens, or if all came in one piece.
        """
        if len(self.chunk_s) < 2 or self.output_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds between successive pieces of text."""
        return [later - earlier for earlier, later in pairwise(self.chunk_s)]

    @property
    def e2e_s(self) -> float:
        """Seconds from the scheduled arrival to the end of the stream."""
        return self.end_s - self.scheduled_s

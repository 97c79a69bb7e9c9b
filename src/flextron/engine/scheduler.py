"""Which tokens run next: decode tokens of all running requests first, then prompts in chunks, within a budget.

A request that finds no room for its next token gives way to those that arrived before it: its pages are released and
it starts over later (what its prefix left in the cache is found again).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from flextron.engine.pages import PagePool, page_key
from flextron.engine.sequence import Sequence

__all__ = ["Scheduler"]


class Scheduler:
    """Queues of waiting and running requests."""

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        """Start empty.

        Args:
            pool: units of the KV cache.
            page_size: tokens of a page.
            max_num_seqs: requests that run at once.
            max_num_batched_tokens: tokens of an iteration; at least `max_num_seqs`.
            prefix_caching: whether full pages are shared.
        """
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """The earliest admitted first."""
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        """Tokens of prompts that were found in the cache."""
        self._page_size, self._max_num_seqs = page_size, max_num_seqs
        self._max_tokens, self._prefix_caching = max_num_batched_tokens, prefix_caching

    def __iter__(self) -> Iterator[Sequence]:
        """All requests, running ones first."""
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """The requests of the next iteration, with the number of tokens that each computes; pages are reserved."""
        plan: list[tuple[Sequence, int]] = []
        budget = self._max_tokens
        # decoding requests first, so that a long prompt never holds up an answer
        queue = sorted(self.running, key=lambda s: s.num_new > 1)
        planned: set[int] = set()
        before = self.num_preemptions
        while queue and budget:
            sequence = queue.pop(0)
            num_new = min(sequence.num_new, budget)
            while not self.reserve(sequence, sequence.num_computed + num_new):
                victim = next((s for s in reversed(self.running) if id(s) not in planned), sequence)
                self._preempt(victim)
                if victim is sequence:
                    break
                queue.remove(victim)
            else:
                plan.append((sequence, num_new))
                planned.add(id(sequence))
                budget -= num_new
        if self.num_preemptions > before:
            return plan
        while self.waiting and budget and len(self.running) < self._max_num_seqs and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            num_new = min(sequence.num_new, budget)
            plan.append((sequence, num_new))
            budget -= num_new
        return plan

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Get pages for so many tokens in all; False if there is no room (what was got is kept)."""
        while len(sequence.pages) < self._pages_for(num_tokens):
            page = self.pool.allocate(sequence.network.num_units)
            if page is None:
                return False
            sequence.add_page(page)
        return True

    def advance(self, sequence: Sequence, num_new: int) -> None:
        """Count tokens as computed, and let others share the pages that are full now."""
        sequence.num_computed += num_new
        if not self._prefix_caching:
            return
        for i in range(len(sequence.keys), sequence.num_computed // self._page_size):
            self._extend_keys(sequence)
            self.pool.publish(sequence.pages[i], sequence.keys[i])

    def remove(self, sequence: Sequence) -> None:
        """Take a request out, finished or not."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _admit(self, sequence: Sequence) -> bool:
        """Find what the cache has of a waiting request, and reserve pages for all its tokens; False if it must wait."""
        if self._prefix_caching:
            # the last token is always computed: its output is what comes next
            while (len(sequence.pages) + 1) * self._page_size < len(sequence.tokens):
                if len(sequence.keys) == len(sequence.pages):
                    self._extend_keys(sequence)
                page = self.pool.share(sequence.keys[len(sequence.pages)])
                if page is None:
                    break
                sequence.add_page(page)
        found = len(sequence.pages) * self._page_size
        if not self.reserve(sequence, len(sequence.tokens)):
            self._release(sequence)
            return False
        sequence.num_computed = found
        del sequence.keys[found // self._page_size :]
        self.num_cached_tokens += found
        return True

    def _extend_keys(self, sequence: Sequence) -> None:
        """The key of one more page."""
        i = len(sequence.keys)
        before = sequence.keys[-1] if sequence.keys else sequence.network.key
        sequence.keys.append(page_key(before, sequence.tokens[i * self._page_size : (i + 1) * self._page_size]))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        for page in sequence.pages:
            self.pool.release(page)
        sequence.pages.clear()
        sequence.keys.clear()
        sequence.num_computed = 0

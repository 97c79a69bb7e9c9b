"""Which tokens run next: decode tokens of all running requests first, then prompts in chunks, within a budget.

A request that finds no room for its next token gives way to those that arrived before it: its pages are released and
it starts over later (what its prefix left in the cache is found again).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic

from flextron.engine.counts import R
from flextron.engine.pages import PagePool, page_key

__all__ = ["Scheduler"]


class Scheduler(Generic[R]):
    """Queues of waiting and running requests."""

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            pool: blocks of the KV cache.
            page_size: tokens of a page.
            max_num_seqs: requests that run at once.
            max_num_batched_tokens: tokens of an iteration; at least `max_num_seqs`.
            prefix_caching: whether full pages are shared.
            now: a clock in seconds.
        """
        self.pool = pool
        self.waiting: deque[R] = deque()
        self.running: list[R] = []
        """The earliest admitted first."""
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        """Tokens of prompts that were found in the cache."""
        self._page_size, self._max_num_seqs = page_size, max_num_seqs
        self._max_tokens, self._prefix_caching, self._now = max_num_batched_tokens, prefix_caching, now

    def __iter__(self) -> Iterator[R]:
        """All requests, running ones first."""
        yield from self.running
        yield from self.waiting

    def add(self, request: R) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self) -> list[tuple[R, int]]:
        """The requests of the next iteration, with the number of tokens that each computes; pages are reserved."""
        scheduled: list[tuple[R, int]] = []
        budget = self._max_tokens
        # decoding requests first, so that a long prompt never holds up an answer
        queue = sorted(self.running, key=lambda s: s.num_new > 1)
        chosen: set[int] = set()
        before = self.num_preemptions
        while queue and budget:
            request = queue.pop(0)
            num_new = min(request.num_new, budget)
            while not self.reserve(request, request.num_computed_tokens + num_new):
                victim = next((s for s in reversed(self.running) if id(s) not in chosen), request)
                self._preempt(victim)
                if victim is request:
                    break
                queue.remove(victim)
            else:
                scheduled.append((request, num_new))
                chosen.add(id(request))
                budget -= num_new
        if self.num_preemptions > before:
            return scheduled
        while self.waiting and budget and len(self.running) < self._max_num_seqs and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            num_new = min(request.num_new, budget)
            scheduled.append((request, num_new))
            budget -= num_new
        return scheduled

    def reserve(self, request: R, num_tokens: int) -> bool:
        """Get pages for so many tokens in all; False if there is no room (what was got is kept)."""
        num_blocks = request.network.num_blocks
        for _ in range(len(request.pages), self._pages_for(num_tokens)):
            page = self.pool.allocate(num_blocks)
            if page is None:
                return False
            request.add_page(page)
        return True

    def advance(self, request: R, num_new: int) -> None:
        """Count tokens as computed, and let others share the pages that are full now."""
        request.num_computed_tokens += num_new
        if not self._prefix_caching or request.has_mixed_pages:
            return
        for i in range(len(request.keys), request.num_computed_tokens // self._page_size):
            self._extend_keys(request)
            self.pool.publish(request.pages[i], request.keys[i])

    def remove(self, request: R) -> None:
        """Take a request out, finished or not."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _admit(self, request: R) -> bool:
        """Find what the cache has of a waiting request, and reserve pages for all its tokens; False if it must wait."""
        if self._prefix_caching and not request.computes_prompt:
            # the last token is always computed: its output is what comes next
            while (len(request.pages) + 1) * self._page_size < request.num_tokens:
                if len(request.keys) == len(request.pages):
                    self._extend_keys(request)
                page = self.pool.share(request.keys[len(request.pages)])
                if page is None:
                    break
                request.add_page(page)
        found = len(request.pages) * self._page_size
        if not self.reserve(request, request.num_tokens):
            self._release(request)
            return False
        request.num_computed_tokens = found
        del request.keys[found // self._page_size :]
        if request.num_cached_tokens is None:
            request.num_cached_tokens, request.started = found, self._now()
        self.num_cached_tokens += found
        return True

    def _extend_keys(self, request: R) -> None:
        """The key of one more page."""
        i = len(request.keys)
        before = request.keys[-1] if request.keys else request.network.key
        request.keys.append(page_key(before, request.tokens[i * self._page_size : (i + 1) * self._page_size]))

    def _preempt(self, request: R) -> None:
        self.num_preemptions += 1
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: R) -> None:
        for page in request.pages:
            self.pool.release(page)
        request.pages.clear()
        request.keys.clear()
        request.has_mixed_pages = False
        request.num_computed_tokens = 0

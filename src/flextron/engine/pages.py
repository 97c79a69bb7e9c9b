"""Memory of keys and values: blocks, pages of blocks, and prefixes that requests share. No tensors here.

A block holds one KV head of one layer for a page's tokens. A page of a sequence has a block for each KV head of each
layer of its sub-network, so a request's bytes are proportional to its attention groups, and sub-networks of all sizes
draw from one pool without fragments. Full pages are kept after use under a key of their tokens and all before them,
until their blocks are needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from flextron.errors import FlextronError

__all__ = ["Page", "PagePool", "page_key"]


@dataclass(slots=True, eq=False)
class Page:
    """Blocks of one page of one or more sequences."""

    blocks: list[int]
    num_users: int = 1
    key: bytes | None = None
    """Key of its content, once it is full and may be shared."""


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full page by its tokens and the name of the page before it (for the first: of the sub-network)."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class PagePool:
    """Hands out blocks and takes them back."""

    def __init__(self, num_blocks: int) -> None:
        """Start with `num_blocks` free blocks."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._by_key: dict[bytes, Page] = {}
        self._idle: OrderedDict[bytes, Page] = OrderedDict()
        """Pages without users, the longest unused first."""
        self._num_idle_blocks = 0

    @property
    def num_available(self) -> int:
        """Blocks that are free, or held by pages that nobody uses."""
        return len(self._free) + self._num_idle_blocks

    @property
    def num_used(self) -> int:
        """Blocks of pages in use."""
        return self.num_blocks - self.num_available

    def allocate(self, num_blocks: int) -> Page | None:
        """A new page; None if there are not enough blocks. Unused pages are given up, the longest unused first."""
        if num_blocks > self.num_available:
            return None
        while len(self._free) < num_blocks:
            key, page = self._idle.popitem(last=False)
            del self._by_key[key]
            self._num_idle_blocks -= len(page.blocks)
            self._free += page.blocks
        blocks = self._free[len(self._free) - num_blocks :]
        del self._free[len(self._free) - num_blocks :]
        return Page(blocks)

    def share(self, key: bytes) -> Page | None:
        """The page of this content, with one more user; None if there is none."""
        page = self._by_key.get(key)
        if page is None:
            return None
        if page.num_users == 0:
            del self._idle[key]
            self._num_idle_blocks -= len(page.blocks)
        page.num_users += 1
        return page

    def publish(self, page: Page, key: bytes) -> None:
        """Let others share a page whose content will not change any more; the first of equal pages is kept."""
        if page.key is None and key not in self._by_key:
            page.key = key
            self._by_key[key] = page

    def release(self, page: Page) -> None:
        """One user less; a page without users is kept if it has a key, else its blocks are free."""
        page.num_users -= 1
        if page.num_users:
            return
        if page.key is None:
            self._free += page.blocks
        else:
            self._idle[page.key] = page
            self._num_idle_blocks += len(page.blocks)

    def forget(self) -> None:
        """Give up all pages without users."""
        for key, page in self._idle.items():
            del self._by_key[key]
            self._free += page.blocks
        self._idle.clear()
        self._num_idle_blocks = 0

    def check_integrity(self, pages_in_use: Sequence[Page]) -> None:
        """Raise unless every block is in exactly one place.

        Args:
            pages_in_use: pages of all sequences, with repeats where they share.
        """
        users: dict[int, int] = {}
        distinct: dict[int, Page] = {}
        for page in pages_in_use:
            users[id(page)] = users.get(id(page), 0) + 1
            distinct[id(page)] = page
        if any(page.num_users != users[i] for i, page in distinct.items()):
            raise FlextronError("a page counts other users than it has")
        held = [u for page in (*distinct.values(), *self._idle.values()) for u in page.blocks] + self._free
        if sorted(held) != list(range(self.num_blocks)):
            raise FlextronError("a block of the KV cache is lost, or is in two places")

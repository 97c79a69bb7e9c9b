"""Adapters that requests may name: which there are, and those of them that are in memory.

`AdapterNames` is filled at the start and by the thread that trains. `LoadedAdapters` reads an adapter when it is first
asked for, holds it while it is used, and lets go of the one that was used least recently when there are too many.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flextron.checkpoints.peft.outer import BaseNeededError
from flextron.checkpoints.peft.reading import read_adapter
from flextron.errors import FlextronError
from flextron.jobs.records import JobCheckpoint
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.serving.errors import ApiError, not_found

__all__ = ["FINETUNED", "AdapterNames", "LoadedAdapters", "NamedAdapter", "adapter_reader", "is_word"]

_log = logging.getLogger("flextron.server")
FINETUNED = "ft:"
"""The names of adapters that jobs made begin with it."""

ReadAdapter = Callable[[Path], Adapter]


def is_word(name: str) -> bool:
    """Whether a model's or an adapter's name can stand before `@` and a target."""
    return bool(name) and "@" not in name and name.isprintable() and not any(c.isspace() for c in name)


@dataclass(frozen=True, eq=False, slots=True)
class NamedAdapter:
    """An adapter on the disk and its name."""

    name: str
    directory: Path
    """Directory in peft's layout; it holds all of it and never changes."""
    created_at: int
    """Unix time."""


class AdapterNames:
    """All adapters that requests may name; callable from any thread."""

    def __init__(self) -> None:
        """There are no adapters yet."""
        self._lock = threading.Lock()
        self._named: dict[str, NamedAdapter] = {}

    def add(self, name: str, directory: Path, read: ReadAdapter) -> None:
        """Add an adapter that the operator gives.

        Args:
            name: its name.
            directory: where it lies.
            read: reads it once, to see that it can be read.

        Raises:
            FlextronError: the name does not fit or is taken, or there is no adapter for this model.
        """
        if not is_word(name):
            raise FlextronError(f"the adapter's name {name!r} must be a word without @")
        if name.startswith(FINETUNED):
            raise FlextronError(f"the adapter's name {name!r} begins with {FINETUNED}, as only finetuned models' do")
        read(directory)
        with self._lock:
            if name in self._named:
                raise FlextronError(f"two adapters are called {name!r}; give each a name of its own")
            self._named[name] = NamedAdapter(name, directory, int(time.time()))

    def add_checkpoint(self, checkpoint: JobCheckpoint, directory: Path) -> None:
        """Add an adapter that a job made. It is called as `on_adapter` of `Jobs`."""
        with self._lock:
            self._named[checkpoint.name] = NamedAdapter(checkpoint.name, directory, checkpoint.created_at)

    def remove_checkpoint(self, checkpoint: JobCheckpoint) -> None:
        """Hide an adapter from new requests. It is called as `on_deleted` of `Jobs`."""
        with self._lock:
            self._named.pop(checkpoint.name, None)

    def get(self, name: str) -> NamedAdapter | None:
        """The adapter with this name, or None."""
        with self._lock:
            return self._named.get(name)

    def all(self) -> list[NamedAdapter]:
        """All adapters in the order in which they were added."""
        with self._lock:
            return list(self._named.values())


@dataclass(eq=False, slots=True)
class _Held:
    """An adapter that is in memory or being read."""

    loading: asyncio.Future[Adapter]
    num_users: int = 0


class LoadedAdapters:
    """The adapters in memory. Its methods belong to the event loop."""

    def __init__(
        self, names: AdapterNames, read: ReadAdapter, most: int, on_drop: Callable[[Adapter], None] = lambda _: None
    ) -> None:
        """Nothing is in memory yet.

        Args:
            names: the adapters that exist.
            read: reads an adapter; it is called in a thread of its own.
            most: how many may be in memory at once.
            on_drop: called with each adapter that leaves the memory.
        """
        self._names, self._read, self._most, self._on_drop = names, read, most, on_drop
        self._held: OrderedDict[NamedAdapter, _Held] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, "flextron-adapters")

    @property
    def names(self) -> list[str]:
        """Names of the adapters in memory, the one used least recently first."""
        return [named.name for named in self._held]

    async def acquire(self, named: NamedAdapter) -> Adapter:
        """Get an adapter. It stays in memory until it is released.

        Raises:
            ApiError: it was deleted or cannot be read, or all that fit into memory are in use.
        """
        if named not in self._held:
            self._make_room()
            loading = asyncio.get_running_loop().run_in_executor(self._reader, self._read, named.directory)
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting
            self._held[named] = _Held(loading)
        held = self._held[named]
        self._held.move_to_end(named)
        held.num_users += 1
        try:
            # others may wait for the same
            return await asyncio.shield(held.loading)
        except (FlextronError, OSError) as error:
            held.num_users -= 1
            if self._held.get(named) is held:
                del self._held[named]
            if not self._is_there(named):
                raise not_found(named.name) from error
            _log.error("the adapter %s cannot be read: %s", named.name, error)
            message = f"the adapter {named.name!r} cannot be read; the server's log says why"
            raise ApiError(400, message, param="model", code="adapter_damaged") from error
        except BaseException:
            self.release(named)
            raise

    def release(self, named: NamedAdapter) -> None:
        """End one use of an adapter."""
        held = self._held[named]
        held.num_users -= 1
        if not held.num_users and not self._is_there(named):
            self._drop(named)

    def tidy(self) -> None:
        """Drop deleted adapters that nobody uses."""
        for named in [n for n, held in self._held.items() if not held.num_users and not self._is_there(n)]:
            self._drop(named)

    def close(self) -> None:
        """Stop reading adapters."""
        self._reader.shutdown(cancel_futures=True)

    def _is_there(self, named: NamedAdapter) -> bool:
        return self._names.get(named.name) is named

    def _make_room(self) -> None:
        while len(self._held) >= self._most:
            idle = next((named for named, held in self._held.items() if not held.num_users), None)
            if idle is None:
                message = f"all {self._most} adapters that fit into memory are in use; ask again later"
                raise ApiError(429, message, kind="rate_limit_error", headers={"retry-after": "1"})
            self._drop(idle)

    def _drop(self, named: NamedAdapter) -> None:
        loading = self._held.pop(named).loading
        if loading.done() and not loading.cancelled() and loading.exception() is None:
            self._on_drop(loading.result())


def adapter_reader(decoder: Decoder, *, has_weights: bool = True) -> ReadAdapter:
    """A function that reads adapters for a decoder onto the device of its weights.

    Args:
        decoder: what they are for.
        has_weights: whether all its weights are in this process, as DoRA and embeddings need for the reading.
    """

    def read(directory: Path) -> Adapter:
        try:
            adapter = read_adapter(directory, decoder if has_weights else decoder.config)
        except BaseNeededError as error:
            raise FlextronError(
                f"the adapter in {directory} has DoRA, or parts beside embedding or head, which cannot be served on "
                "several ranks; serve it without --tensor-parallel"
            ) from error
        return adapter.to(decoder.device, decoder.dtype).eval().requires_grad_(False)

    return read

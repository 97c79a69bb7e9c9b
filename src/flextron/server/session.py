"""The jobs of one HTTP request, from the queue to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from flextron.engine.output import Delta
from flextron.errors import FlextronError
from flextron.server.adapters import NamedAdapter
from flextron.server.adaptive import Adaptive
from flextron.server.errors import ApiError, bad_request, engine_died
from flextron.server.metrics import Metrics
from flextron.server.targets import Choice
from flextron.server.worker import Event, Job, Sign, Worker

__all__ = ["Session"]


class Session:
    """The jobs of one HTTP request, as the event loop sees them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        choice: Choice,
        *,
        worker: Worker,
        metrics: Metrics,
        adaptive: Adaptive | None,
        on_close: Callable[[Session], None],
    ) -> None:
        """Nothing is queued yet."""
        self.choice = choice
        self._jobs, self._worker, self._on_close = jobs, worker, on_close
        self._metrics, self._adaptive = metrics, adaptive
        self.adapter: NamedAdapter | None = None
        """What is held in memory for the jobs."""
        self._events: asyncio.Queue[tuple[int, Event | ApiError]] = asyncio.Queue()
        self._arrived = time.monotonic()
        self._last: dict[int, float] = {}
        """When the last token of each job came."""
        self._begun: set[int] = set()
        self._open = {job.index: job for job in jobs}
        self._has_closed = False
        for job in jobs:
            job.listener = self._hear

    @property
    def num_open(self) -> int:
        """Jobs that have not ended."""
        return len(self._open)

    @property
    def num_prompt_tokens(self) -> list[int]:
        """Number of prompt tokens of each job."""
        return [len(job.prompt) for job in self._jobs]

    @property
    def unanswered_for(self) -> float:
        """Seconds since the arrival of a job that has no token yet; 0 if there is none."""
        waits = self._open.keys() - self._last.keys()
        return time.monotonic() - self._arrived if waits else 0.0

    async def accepted(self) -> None:
        """Queue the jobs; returns when the engine has taken them.

        Raises:
            ApiError: it has not.
        """
        self._worker.submit(self._jobs)
        for _ in self._jobs:
            _, event = await self._events.get()
            _raise_if_bad(event)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What is added to answers, each with its job's index, until all have ended.

        Raises:
            ApiError: the engine died, or the server stops.
        """
        left = len(self._jobs)
        while left:
            index, event = await self._events.get()
            _raise_if_bad(event)
            if isinstance(event, Delta):
                left -= event.finish_reason is not None
                yield index, event

    def fail(self, error: ApiError) -> None:
        """Break off."""
        self._events.put_nowait((0, error))

    def close(self) -> None:
        """Free what the jobs hold; nothing happens the second time."""
        if self._has_closed:
            return
        self._has_closed = True
        if self._open:
            self._worker.abort(list(self._open.values()))
            for _ in self._begun & self._open.keys():
                self._metrics.ended("abort", time.monotonic() - self._arrived)
        self._open.clear()
        self._on_close(self)

    def _hear(self, job: Job, event: Event) -> None:
        if self._has_closed:
            return
        metrics, now = self._metrics, time.monotonic()
        if event is Sign.ACCEPTED:
            self._begun.add(job.index)
            metrics.started(self.choice.label, len(job.prompt), was_narrowed=self.choice.was_narrowed)
        if isinstance(event, Delta):
            if event.token is not None:
                is_first, seconds = job.index not in self._last, now - self._last.get(job.index, self._arrived)
                self._last[job.index] = now
                metrics.token(self.choice.label, seconds, is_first=is_first)
                if self._adaptive is not None:
                    self._adaptive.token(seconds, is_first=is_first)
            if event.finish_reason is not None:
                del self._open[job.index]
                metrics.ended(event.finish_reason.value, now - self._arrived)
        self._events.put_nowait((job.index, event))


def _raise_if_bad(event: Event | ApiError) -> None:
    if isinstance(event, ApiError):
        raise event
    if isinstance(event, FlextronError):
        raise bad_request(str(event))
    if event is Sign.DIED:
        raise engine_died()

"""The requests of one HTTP request, from the queue to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from flextron.engine.output import Delta
from flextron.errors import FlextronError, PromptError
from flextron.serving.adapters import NamedAdapter
from flextron.serving.adaptive import Adaptive
from flextron.serving.errors import ApiError, bad_request, engine_died
from flextron.serving.metrics import Metrics, Span
from flextron.serving.targets import Choice
from flextron.serving.worker import GenerationRequest, RequestEvent, Sign, Worker

__all__ = ["Session"]


class Session:
    """The requests of one HTTP request, as the event loop sees them."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        choice: Choice,
        *,
        worker: Worker,
        metrics: Metrics,
        adaptive: Adaptive | None,
        on_close: Callable[[Session], None],
    ) -> None:
        """Nothing is queued yet."""
        self.choice = choice
        self._requests, self._worker, self._on_close = requests, worker, on_close
        self._metrics, self._adaptive = metrics, adaptive
        self.adapter: NamedAdapter | None = None
        """The adapter that is held in memory for the requests."""
        self._events: asyncio.Queue[tuple[int, RequestEvent | ApiError]] = asyncio.Queue()
        self._arrived = time.monotonic()
        self._last: dict[int, float] = {}
        """When the last token of each request came."""
        self._spans: dict[int, Span] = {}
        self._begun: set[int] = set()
        self._open = {request.index: request for request in requests}
        self._has_closed = False
        for request in requests:
            request.listener = self._hear

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def num_prompt_tokens(self) -> list[int]:
        """Number of prompt tokens of each request."""
        return [len(request.prompt) for request in self._requests]

    @property
    def unanswered_for(self) -> float:
        """Seconds since the arrival of a request that has no token yet; 0 if there is none."""
        waits = self._open.keys() - self._last.keys()
        return time.monotonic() - self._arrived if waits else 0.0

    async def accepted(self) -> None:
        """Queue the requests, and return when the engine has taken them.

        Raises:
            PromptError: it cannot take one of the prompts.
            ApiError: the sub-network and the adapter do not go together, the engine died, or the server stops.
        """
        self._worker.submit(self._requests)
        for _ in self._requests:
            _, event = await self._events.get()
            _raise_if_bad(event)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What is added to answers, each with its request's index, until all have ended.

        Raises:
            ApiError: the engine died, or the server stops.
        """
        left = len(self._requests)
        while left:
            index, event = await self._events.get()
            _raise_if_bad(event)
            if isinstance(event, Delta):
                left -= event.finish_reason is not None
                yield index, event

    def narrow(self, choice: Choice) -> None:
        """Have the requests go on in a narrower sub-network; `choice` changes when they do."""
        self._worker.narrow(list(self._open.values()), choice)

    def fail(self, error: ApiError) -> None:
        """Break the requests off with an error."""
        self._events.put_nowait((0, error))

    def close(self) -> None:
        """Free what the requests hold. A second call does nothing."""
        if self._has_closed:
            return
        self._has_closed = True
        if self._open:
            self._worker.abort(list(self._open.values()))
            for _ in self._begun & self._open.keys():
                self._metrics.ended("abort", time.monotonic() - self._arrived)
        self._open.clear()
        self._on_close(self)

    def _hear(self, request: GenerationRequest, event: RequestEvent) -> None:
        if self._has_closed:
            return
        metrics, now = self._metrics, time.monotonic()
        if isinstance(event, Choice):
            if not self.choice.was_narrowed:
                metrics.narrowed()
            self.choice = event
            return
        if event is Sign.ACCEPTED:
            self._begun.add(request.index)
            metrics.started(self.choice.label, len(request.prompt), was_narrowed=self.choice.was_narrowed)
        if isinstance(event, Delta):
            if event.token_ids:
                is_first, seconds = request.index not in self._last, now - self._last.get(request.index, self._arrived)
                self._last[request.index] = now
                span = self._spans.setdefault(request.index, Span(self._arrived, event.started or now, now))
                span.num_tokens += len(event.token_ids)
                metrics.token(self.choice.label, seconds, is_first=is_first)
                if self._adaptive is not None:
                    self._adaptive.token(seconds, is_first=is_first)
            if event.finish_reason is not None:
                del self._open[request.index]
                metrics.ended(event.finish_reason.value, now - self._arrived)
                span = self._spans.pop(request.index, Span(self._arrived, event.started or now, now))
                metrics.completed(span, now, len(request.prompt), request.params.max_tokens)
        self._events.put_nowait((request.index, event))


def _raise_if_bad(event: RequestEvent | ApiError) -> None:
    if isinstance(event, ApiError | PromptError):
        raise event
    if isinstance(event, FlextronError):
        raise bad_request(str(event), "flextron")
    if event is Sign.DIED:
        raise engine_died()

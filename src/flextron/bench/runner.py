"""Sends requests when they are due, whatever became of the earlier ones, until all are done or it is interrupted."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from flextron.bench.plan import Request
from flextron.bench.timeline import Timeline
from flextron.errors import FlextronError
from flextron.progress import OnProgress

__all__ = ["BenchmarkRun", "Sender", "drive"]


class Sender(Protocol):
    """Sends one request and reports on it."""

    async def __call__(self, request: Request, start: float, scheduled_s: float) -> Timeline:
        """What was seen, on the clock that was 0 at `start`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkRun:
    """What became of a load."""

    timelines: tuple[Timeline, ...]
    """Requests that came to an end, well or not, in the order in which they ended."""
    num_unfinished: int
    """Requests under way or not yet sent when the run was interrupted."""

    @property
    def interrupted(self) -> bool:
        """Whether the run was cut short."""
        return self.num_unfinished > 0


@contextmanager
def _interrupts_set(stop: asyncio.Event) -> Iterator[None]:
    """Let Ctrl-C set an event instead of raising, where signals can be handled (the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(stop.set))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@asynccontextmanager
async def _slot(slots: asyncio.Semaphore | None) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        if slots is not None:
            await stack.enter_async_context(slots)
        yield


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def drive(
    send: Sender,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    on_done: OnProgress = lambda done, total: None,
) -> BenchmarkRun:
    """Send all requests at their times; Ctrl-C ends the run with what is done by then.

    A request without a time is due when it gets one of the `concurrency` slots (closed loop). A request with a time
    that has to wait for a slot keeps it: the wait is part of its latency.

    Args:
        send: sends one request.
        requests: the requests, by time.
        concurrency: requests under way at once, at most; needed where requests have no times.
        on_done: called with the number of requests that ended and of all.

    Raises:
        FlextronError: the concurrency is missing or not positive.
    """
    if concurrency is None and any(request.scheduled_s is None for request in requests):
        raise FlextronError("without arrival times a concurrency is needed; give --rate, --trace or --concurrency")
    if concurrency is not None and concurrency < 1:
        raise FlextronError(f"the concurrency must be positive, not {concurrency}")
    slots = None if concurrency is None else asyncio.Semaphore(concurrency)
    timelines: list[Timeline] = []
    tasks: list[asyncio.Task[None]] = []
    start = time.perf_counter()

    async def one(request: Request) -> None:
        async with _slot(slots):
            due = request.scheduled_s
            timelines.append(await send(request, start, time.perf_counter() - start if due is None else due))
        on_done(len(timelines), len(requests))

    async def dispatch() -> None:
        for request in requests:
            wait = (request.scheduled_s or 0.0) - (time.perf_counter() - start)
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(request)))
        await asyncio.gather(*tasks)

    stop = asyncio.Event()
    dispatcher = asyncio.create_task(dispatch())
    stopper = asyncio.create_task(stop.wait())
    try:
        with _interrupts_set(stop):
            await asyncio.wait({dispatcher, stopper}, return_when=asyncio.FIRST_COMPLETED)
        if dispatcher.done():
            dispatcher.result()  # an exception here is a bug, not a failed request
    finally:
        stopper.cancel()
        dispatcher.cancel()
        await _cancel(tasks)
        await asyncio.gather(dispatcher, stopper, return_exceptions=True)
    return BenchmarkRun(timelines=tuple(timelines), num_unfinished=len(requests) - len(timelines))

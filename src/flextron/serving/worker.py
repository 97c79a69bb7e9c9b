"""The engine in a thread of its own. Commands come through a queue, and results go to the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from transformers import PreTrainedTokenizerBase

from flextron.engine import CoServingScheduler, EngineCore, Pooling, Request, StepOutput
from flextron.engine.output import Delta, OutputProcessor
from flextron.errors import FlextronError
from flextron.generation.constraints import Constraint
from flextron.generation.sampling import SamplingParams
from flextron.model.adapter import Adapter
from flextron.parallel.companions import LostRankError
from flextron.routing.token_router import PricedRouter
from flextron.serving.targets import Choice
from flextron.spec import SubnetSpec

__all__ = ["GenerationRequest", "Load", "RequestEvent", "Sign", "Worker"]

_log = logging.getLogger("flextron.server")


class Sign(Enum):
    """What a request hears of, apart from deltas."""

    ACCEPTED = "accepted"
    DIED = "died"
    """The engine has stopped because of an error."""


RequestEvent = Delta | Sign | Choice | FlextronError
"""A choice means that the answer goes on in another sub-network; an error that the request, and those queued with it,
were refused."""


def _nobody(request: GenerationRequest, event: RequestEvent) -> None:
    pass


@dataclass(eq=False, slots=True)
class GenerationRequest:
    """One sequence of tokens to be continued."""

    index: int
    """Number within its HTTP request."""
    prompt: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    spec: SubnetSpec
    router: PricedRouter | None
    adapter: Adapter | None = None
    constraint: Constraint | None = None
    """A grammar at its start, this request's own."""
    pooling: Pooling | None = None
    """How the prompt becomes a vector, where that is wanted in the place of an answer."""
    includes_stop: bool = False
    """Whether the text keeps what ended it."""
    skip_special_tokens: bool = True
    listener: Callable[[GenerationRequest, RequestEvent], None] = _nobody
    """Called in the event loop."""
    engine_request: Request | None = field(default=None, repr=False)
    """The engine's form of it, for the worker alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How busy the engine is, for metrics."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """A fraction."""
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens of all accepted requests."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the cache."""
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Drafted tokens that were accepted."""


class Worker(threading.Thread):
    """Owns the engine from `start` on."""

    def __init__(
        self,
        core: EngineCore,
        tokenizer: PreTrainedTokenizerBase,
        coserving: CoServingScheduler[StepOutput] | None = None,
        on_loss: Callable[[LostRankError], None] = lambda _: None,
    ) -> None:
        """Take the engine.

        Args:
            core: the engine.
            tokenizer: for the answers' text.
            coserving: gives training the time between iterations, if there is something to train.
            on_loss: called, in this thread, when it ends because another rank is gone.
        """
        super().__init__(name="flextron-engine", daemon=True)
        self.core = core
        self.load = Load()
        """Replaced as a whole, so that other threads may read it."""
        self._tokenizer, self._coserving, self._on_loss = tokenizer, coserving, on_loss
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._requests: dict[Request, tuple[GenerationRequest, OutputProcessor]] = {}
        self._num_prompt_tokens = 0
        self._has_ended = False

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; listeners are called in this event loop."""
        self._loop = loop
        self.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests, all or none of them; callable from any thread, as all methods but `run`."""
        self._commands.put(partial(self._add, requests))
        if self._has_ended:
            self._post([(request, Sign.DIED) for request in requests])

    def abort(self, requests: Sequence[GenerationRequest]) -> None:
        """End requests that were submitted; nothing more is heard of them."""
        self._commands.put(partial(self._abort, requests))

    def narrow(self, requests: Sequence[GenerationRequest], choice: Choice) -> None:
        """Go on with running requests in a narrower sub-network; their listeners hear the choice if they do."""
        self._commands.put(partial(self._narrow, requests, choice))

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter that no request will name any more."""
        self._commands.put(partial(self.core.forget, adapter))

    def call(self, work: Callable[[], None]) -> Future[None]:
        """Do something between two iterations; all requests wait meanwhile.

        Returns:
            What becomes of it; cancelled if the thread ends before.
        """
        future: Future[None] = Future()
        self._commands.put(partial(self._call, work, future))
        if self._has_ended:
            future.cancel()
        return future

    def wake(self) -> None:
        """There is something to train."""
        self._commands.put(lambda: None)

    def shut_down(self) -> None:
        """End the thread after the step that runs."""
        self._commands.put(None)

    def run(self) -> None:
        """Step while there is work; wait while there is none."""
        try:
            while self._obey():
                self._step()
                self._report()
                if self._coserving is not None:
                    self._coserving.fill(lambda: not self._commands.empty())
        except LostRankError as error:
            _log.error("the engine has stopped: %s", error)
            self._on_loss(error)
        except Exception:
            _log.exception("the engine has stopped")
        finally:
            self._has_ended = True
            self._post([(request, Sign.DIED) for request, _ in self._requests.values()])
            while not self._commands.empty():
                command = self._commands.get()
                if isinstance(command, partial) and command.func == self._add:
                    self._post([(request, Sign.DIED) for request in command.args[0]])
                elif isinstance(command, partial) and command.func == self._call:
                    command.args[1].cancel()

    def _obey(self) -> bool:
        """Carry out what is queued; waits for a command if there is nothing else to do. False: end."""
        has_training = self._coserving is not None and self._coserving.work.unit is not None
        must_wait = not self.core.has_unfinished and not has_training
        while must_wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            must_wait = False
        return True

    def _call(self, work: Callable[[], None], future: Future[None]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            work()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        try:
            for request in requests:
                network = self.core.network(request.spec, request.router, request.adapter)
                request.engine_request = self.core.add(
                    str(id(request)), request.prompt, request.params, network, request.constraint, request.pooling
                )
                processor = OutputProcessor(
                    self._tokenizer,
                    request.stop,
                    request.prompt,
                    includes_stop=request.includes_stop,
                    skip_special_tokens=request.skip_special_tokens,
                )
                self._requests[request.engine_request] = request, processor
        except FlextronError as error:
            self._abort(requests)
            self._post([(request, error) for request in requests])
            return
        self._num_prompt_tokens += sum(len(request.prompt) for request in requests)
        self._post([(request, Sign.ACCEPTED) for request in requests])

    def _abort(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            if request.engine_request is not None:
                self.core.abort(request.engine_request)
                self._requests.pop(request.engine_request, None)
                if self._coserving is not None:
                    self._coserving.forget(request.engine_request)

    def _narrow(self, requests: Sequence[GenerationRequest], choice: Choice) -> None:
        for request in requests:
            if request.engine_request is None or request.engine_request not in self._requests:
                continue
            try:
                self.core.narrow(request.engine_request, choice.spec)
            except FlextronError:
                continue  # its adapter has no place for the sub-network: it stays as it is
            self._post([(request, choice)])

    def _step(self) -> None:
        events: list[tuple[GenerationRequest, RequestEvent]] = []
        for output in (self._coserving or self.core).step():
            if output.request not in self._requests:
                continue  # a stop string ended it with an earlier token of this step
            request, processor = self._requests[output.request]
            delta = processor.take(output)
            if delta.finish_reason is not None:
                # a stop string ends the answer before the engine knows
                self._abort([request])
            events.append((request, delta))
        if events:
            self._post(events)

    def _post(self, events: list[tuple[GenerationRequest, RequestEvent]]) -> None:
        """Tell the requests' listeners, in the event loop."""

        def deliver() -> None:
            for request, event in events:
                request.listener(request, event)

        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def _report(self) -> None:
        scheduler, pool, speculator = self.core.scheduler, self.core.pool, self.core.speculator
        self.load = Load(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=pool.num_used / pool.num_blocks if pool.num_blocks else 0.0,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_drafted_tokens=speculator.num_drafted if speculator else 0,
            num_accepted_tokens=speculator.num_accepted if speculator else 0,
        )

"""The engine in a thread of its own: commands come in through a queue, what a step did goes out to the event loop."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from transformers import PreTrainedTokenizerBase

from flextron.engine import EngineCore, Filler
from flextron.engine import Sequence as Running
from flextron.engine.output import Answer, Delta
from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams
from flextron.model.adapter import Adapter
from flextron.routing.token_router import PricedRouter
from flextron.spec import SubnetSpec

__all__ = ["Event", "Job", "Load", "Sign", "Worker"]

_log = logging.getLogger("flextron.server")


class Sign(Enum):
    """What happens to a job beside deltas."""

    ACCEPTED = "accepted"
    DIED = "died"
    """The engine can do nothing any more."""


Event = Delta | Sign | FlextronError
"""An error means that the job, and those queued with it, were refused."""


def _nobody(job: Job, event: Event) -> None:
    pass


@dataclass(eq=False, slots=True)
class Job:
    """One sequence of tokens to be continued."""

    index: int
    """Number within its HTTP request."""
    prompt: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    spec: SubnetSpec
    router: PricedRouter | None
    adapter: Adapter | None = None
    listener: Callable[[Job, Event], None] = _nobody
    """Called in the event loop."""
    running: Running | None = field(default=None, repr=False)
    """The engine's form; the worker's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How busy the engine is, for metrics."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """A fraction."""
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens of all accepted jobs."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the cache."""
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Drafted tokens that were accepted."""


Post = Callable[[list[tuple[Job, Event]]], None]


class Worker(threading.Thread):
    """Owns the engine from `start` on."""

    def __init__(
        self, core: EngineCore, tokenizer: PreTrainedTokenizerBase, post: Post, filler: Filler | None = None
    ) -> None:
        """Take the engine.

        Args:
            core: the engine.
            tokenizer: makes the answers' text.
            post: called in this thread with what happened to jobs; must pass it on to their listeners.
            filler: uses the time between iterations, if there is something to train.
        """
        super().__init__(name="flextron-engine", daemon=True)
        self.core = core
        self.load = Load()
        """Replaced as a whole, so that other threads may read it."""
        self._tokenizer, self._post, self._filler = tokenizer, post, filler
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[Running, tuple[Job, Answer]] = {}
        self._num_prompt_tokens = 0
        self._has_ended = False

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none of them; callable from any thread, as all methods but `run`."""
        self._commands.put(partial(self._add, jobs))
        if self._has_ended:
            self._post([(job, Sign.DIED) for job in jobs])

    def abort(self, jobs: Sequence[Job]) -> None:
        """End jobs that were submitted; nothing more is heard of them."""
        self._commands.put(partial(self._abort, jobs))

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter that no job will name any more."""
        self._commands.put(partial(self.core.forget, adapter))

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
                if self._filler is not None:
                    self._filler.fill(lambda: not self._commands.empty())
        except Exception:
            _log.exception("the engine has stopped")
        finally:
            self._has_ended = True
            self._post([(job, Sign.DIED) for job, _ in self._jobs.values()])
            while not self._commands.empty():
                command = self._commands.get()
                if isinstance(command, partial) and command.func == self._add:
                    self._post([(job, Sign.DIED) for job in command.args[0]])

    def _obey(self) -> bool:
        """Carry out what is queued; waits for a command if there is nothing else to do. False: end."""
        has_training = self._filler is not None and self._filler.work.unit is not None
        must_wait = not self.core.has_unfinished and not has_training
        while must_wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            must_wait = False
        return True

    def _add(self, jobs: Sequence[Job]) -> None:
        try:
            for job in jobs:
                network = self.core.network(job.spec, job.router, job.adapter)
                job.running = self.core.add(str(id(job)), job.prompt, job.params, network)
                self._jobs[job.running] = job, Answer(self._tokenizer, job.stop, job.prompt)
        except FlextronError as error:
            self._abort(jobs)
            self._post([(job, error) for job in jobs])
            return
        self._num_prompt_tokens += sum(len(job.prompt) for job in jobs)
        self._post([(job, Sign.ACCEPTED) for job in jobs])

    def _abort(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.running is not None:
                self.core.abort(job.running)
                self._jobs.pop(job.running, None)
                if self._filler is not None:
                    self._filler.forget(job.running)

    def _step(self) -> None:
        events: list[tuple[Job, Event]] = []
        for output in (self._filler or self.core).step():
            if output.sequence not in self._jobs:
                continue  # a stop string ended it with an earlier token of this step
            job, answer = self._jobs[output.sequence]
            delta = answer.take(output)
            if delta.finish_reason is not None:
                # a stop string ends the answer before the engine knows
                self._abort([job])
            events.append((job, delta))
        if events:
            self._post(events)

    def _report(self) -> None:
        scheduler, pool, speculator = self.core.scheduler, self.core.pool, self.core.speculator
        self.load = Load(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=pool.num_used / pool.num_units if pool.num_units else 0.0,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_drafted_tokens=speculator.num_drafted if speculator else 0,
            num_accepted_tokens=speculator.num_accepted if speculator else 0,
        )

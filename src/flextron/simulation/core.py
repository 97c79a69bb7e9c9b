"""The engine of a simulated replica: the real scheduler over requests that are numbers.

An iteration is what `engine/engine.py` makes of it: schedule, compute, one token for each request whose tokens are all
computed, end after the last one. Computing takes the time that the machine says, and nothing else. A test holds the
real engine, driven by the same clock, to the same iterations.

Where nothing can change from one iteration to the next, several are leapt over at once, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import gcd

from flextron.engine import EngineSettings, FinishReason
from flextron.engine.pages import Page, PagePool
from flextron.engine.scheduler import Scheduler
from flextron.errors import FlextronError
from flextron.simulation.machine import Machine
from flextron.simulation.times import Chunk, Clock, IterationTimes, Jitter, Leap

__all__ = ["SimulatedCore", "SimulatedNetwork", "SimulatedOutput", "SimulatedRequest"]

_KV_UNITS = 1000
"""A full network's page, for shares of it."""


@dataclass(frozen=True, eq=False, slots=True)
class SimulatedNetwork:
    """A sub-network of the machine."""

    index: int
    num_blocks: int
    key: bytes = b""


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """A request as numbers; fields as in `engine/request.py`."""

    index: int
    num_tokens: int
    """Tokens so far; at first those of the prompt."""
    most_tokens: int
    """Tokens of prompt and answer at its end."""
    network: SimulatedNetwork
    arrived: float
    num_computed_tokens: int = 0
    pages: list[Page] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    has_mixed_pages: bool = False
    num_cached_tokens: int | None = None
    started: float | None = None
    computes_prompt: bool = False
    last_ps: int = 0
    """When its last token came; before the first one, when it arrived."""

    @property
    def num_new(self) -> int:
        """Tokens still to compute; 1 while it decodes."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def tokens(self) -> Sequence[int]:
        """Stand-ins for token ids."""
        return range(self.num_tokens)

    def add_page(self, page: Page) -> None:
        """Take one more page."""
        self.pages.append(page)


@dataclass(frozen=True, slots=True)
class SimulatedOutput:
    """A token of a request."""

    request: SimulatedRequest
    finish_reason: FinishReason | None


class _CountedPool(PagePool):
    """A pool whose blocks are only counted: nothing is written to them, and nobody shares them."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(0)
        self.num_blocks = self._num_free = num_blocks
        self._pages: dict[int, Page] = {}

    @property
    def num_available(self) -> int:
        return self._num_free

    def allocate(self, num_blocks: int) -> Page | None:
        if num_blocks > self._num_free:
            return None
        self._num_free -= num_blocks
        page = self._pages.get(num_blocks)
        if page is None:
            page = self._pages[num_blocks] = Page([0] * num_blocks)
        return page

    def release(self, page: Page) -> None:
        self._num_free += len(page.blocks)


def _chunk(request: SimulatedRequest, num_new: int) -> Chunk:
    return Chunk(request.network.index, request.num_computed_tokens, num_new)


class SimulatedCore:
    """Continuous batching over a paged cache, in time that only the machine's numbers make pass."""

    def __init__(
        self,
        machine: Machine,
        settings: EngineSettings,
        clock: Clock,
        times: IterationTimes,
        jitter: Jitter,
        first_iteration: int = 0,
    ) -> None:
        """Start with an empty cache.

        Args:
            machine: its cache and its sub-networks.
            settings: sizes; `kv_cache_gb` is not used.
            clock: moved by iterations.
            times: those of the machine's iterations; replicas may share one.
            jitter: factors on them; replicas may share one and begin at different places.
            first_iteration: number of the first iteration, by which it finds its factor.

        Raises:
            FlextronError: equal beginnings of prompts would be shared, which no recorded load tells of.
        """
        if settings.prefix_caching:
            raise FlextronError("prefix caching is not simulated, since loads have no texts; set prefix_caching=False")
        self.settings, self.clock, self._times = settings, clock, times
        self._jitter, self._index = jitter, first_iteration
        units = [max(1, round(_KV_UNITS * n.kv_share)) for n in machine.networks]
        common = reduce(gcd, units, _KV_UNITS)
        self.networks = [SimulatedNetwork(i, u // common) for i, u in enumerate(units)]
        num_pages = machine.kv_cache_tokens // settings.page_size
        self.pool = _CountedPool(num_pages * (_KV_UNITS // common))
        self.scheduler: Scheduler[SimulatedRequest] = Scheduler(
            self.pool,
            page_size=settings.page_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_caching=False,
            now=clock,
        )
        self.num_tokens = 0
        """Tokens that the last step computed."""
        self._is_steady = False
        """Whether the last step took all that runs one token on, and nothing else."""

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: SimulatedRequest) -> None:
        """Queue a request."""
        self._is_steady = False
        self.scheduler.add(request)

    def narrow(self, request: SimulatedRequest, index: int) -> None:
        """Go on with a request in a narrower sub-network; its pages stay as large as they are."""
        request.network = SimulatedNetwork(index, request.network.num_blocks)

    def step(self) -> list[SimulatedOutput]:
        """One iteration; the clock stands at its end afterwards."""
        scheduler = self.scheduler
        num_running, num_preemptions = len(scheduler.running), scheduler.num_preemptions
        scheduled = scheduler.schedule()
        self.num_tokens = sum(num_new for _, num_new in scheduled)
        if not scheduled:
            return []
        nanoseconds = self._times.iteration(_chunk(request, num_new) for request, num_new in scheduled)
        self.clock.ps += nanoseconds * self._jitter.at(self._index)
        self._index += 1
        outputs = []
        self._is_steady = self.num_tokens == num_running and scheduler.num_preemptions == num_preemptions
        for request, num_new in scheduled:
            if num_new < request.num_new:
                scheduler.advance(request, num_new)
                self._is_steady = False
                continue
            request.num_tokens += 1
            scheduler.advance(request, num_new)
            has_ended = request.num_tokens == request.most_tokens
            if has_ended:
                scheduler.remove(request)
                self._is_steady = False
            outputs.append(SimulatedOutput(request, FinishReason.LENGTH if has_ended else None))
        self._is_steady = self._is_steady and len(outputs) == num_running == len(scheduler.running)
        return outputs

    def leap(self) -> Leap | None:
        """The iterations that follow and are all alike; None if the next one may differ from those after it.

        In each of them every running request gets a token and none ends. Nobody is admitted either: the queue is
        empty, or its first request found no room in the last step, and room only shrinks. What arrives meanwhile waits
        for the end of an iteration and cuts the leap there.
        """
        running, now = self.scheduler.running, self.clock.ps
        if self.scheduler.waiting and not self._is_steady:
            return None
        # one token to go may also be the last of a prompt
        if any(s.num_new != 1 or s.last_ps != now for s in running):
            return None
        count = min((s.most_tokens - s.num_tokens for s in running), default=0) - 1
        while count > 1 and self._blocks_for(count) > self.pool.num_available:
            count //= 2
        if count <= 1:
            return None
        chunks = [_chunk(request, 1) for request in running]
        return Leap(self._times.iteration(chunks), self._times.growth(chunks), count, self._jitter, self._index)

    def take(self, leap: Leap, count: int) -> None:
        """Let the first iterations of a leap have happened."""
        self.clock.ps += leap.after(count)
        self._index += count
        for request in self.scheduler.running:
            request.num_tokens += count
            request.num_computed_tokens += count
            if not self.scheduler.reserve(request, request.num_computed_tokens):
                raise RuntimeError("a leap went beyond the room in the cache")
            request.last_ps = self.clock.ps
        self.num_tokens = len(self.scheduler.running)

    def _blocks_for(self, count: int) -> int:
        """Blocks that running requests need for so many tokens more."""
        size = self.settings.page_size
        return sum(
            max(0, -(-(s.num_computed_tokens + count) // size) - len(s.pages)) * s.network.num_blocks
            for s in self.scheduler.running
        )

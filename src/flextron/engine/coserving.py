"""Training in the time that serving leaves: FlexLLM's hybrid token scheduler, with deadlines for a fixed budget.

Work comes in units whose size is chosen: so many tokens of one layer. After each iteration of the engine, units run as
long as every request can still get its next token in time. What a unit and an iteration take is learnt while they run,
each kind by itself, for a backward pass costs other than a forward pass. A request that arrives waits for one unit at
most, and training rests while prompts are late.

A request's next token is due when its mean time per token would pass the objective, but never later than two such times
after its last token. So what training may take follows from what each request has had, and a slow iteration (a long
prompt of somebody else) is made up for. As requests may come that nobody foresees, some of each objective is held in
reserve: more after a request that missed it, less after each that did not. The two objectives have reserves of their
own, for a late first token is no reason to read the weights more often for all the others. And the next iteration is
expected to take as long as all but a twentieth of those lately, for it may have somebody's prompt in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from flextron.engine.counts import CountedRequest
from flextron.engine.request import FinishReason
from flextron.engine.scheduler import Scheduler
from flextron.engine.settings import EngineSettings
from flextron.engine.timing import RecentTimes, Reserve, TimeLine
from flextron.errors import FlextronError

__all__ = ["CoServing", "CoServingScheduler", "Iterating", "Output", "Work"]

_MOST_TOKENS = 512
_PROBE_TOKENS = 32
_FEWEST_TOKENS = 8
_MOST_GAP = 2.0
"""Objectives between two tokens of a request."""
_MOST_FIXED = 1 / 3
"""Largest share of a unit's time that may be fixed cost; smaller units wait until there is time for more."""


class Work(Protocol):
    """What fills the time; its methods are called by the engine's thread."""

    @property
    def unit(self) -> Hashable | None:
        """Kind of the next unit, those of one kind taking about the same time a token; None if there is none now."""

    @property
    def num_left(self) -> int:
        """Tokens that the next unit can have at most."""

    def run_unit(self, num_tokens: int) -> None:
        """Run the next unit with at most so many tokens."""


class Output(Protocol):
    """What an iteration did for a request."""

    @property
    def request(self) -> CountedRequest:
        """The request."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None if it goes on."""


Out = TypeVar("Out", bound=Output)


class Iterating(Protocol[Out]):
    """An engine, as far as this policy sees it."""

    @property
    def settings(self) -> EngineSettings:
        """Its sizes."""

    @property
    def scheduler(self) -> Scheduler[Any]:
        """Its requests."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the last iteration computed."""

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""

    def step(self) -> list[Out]:
        """One iteration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoServing:
    """What training must respect."""

    tpot_ms: float | None = None
    """Objective for the mean time per token after the first; by default twice what the model takes alone."""
    ttft_ms: float | None = None
    """Objective for the time to the first token; by default training rests until prompts are computed."""
    max_unit_ms: float = 40.0
    """Longest unit: so long a request that arrives may have to wait for training."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("tpot_ms", "ttft_ms", "max_unit_ms"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise FlextronError(f"{name} must be a number above 0")


class CoServingScheduler(Generic[Out]):
    """Decides what training may run, between iterations of an engine."""

    def __init__(
        self,
        core: Iterating[Out],
        work: Work,
        settings: CoServing | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take both sides.

        Args:
            core: the engine.
            work: the training.
            settings: objectives.
            now: a clock in seconds, that of the requests' `arrived`.
        """
        self.core, self.work, self.settings = core, work, settings or CoServing()
        self.first_reserve, self.token_reserve = Reserve(), Reserve()
        """Parts of the objectives, for the first token and for those after it, that training leaves alone."""
        self.seconds = 0.0
        """Seconds that training took."""
        self._now = now
        self._iterations, self._units = TimeLine(), dict[Hashable, TimeLine]()
        self._alone = math.inf
        """Seconds of the shortest iteration that decoded."""
        self._recent = RecentTimes()
        """What iterations took lately: the next one may have somebody's prompt in it, too."""
        self._tokens: dict[CountedRequest, tuple[float, float, int]] = {}
        """When a running request got its first and last token, and how many it has."""

    def step(self) -> list[Out]:
        """An iteration of the engine, from whose time and outputs deadlines follow."""
        began = self._now()
        outputs = self.core.step()
        ended = self._now()
        num_tokens = self.core.num_tokens
        if num_tokens:
            self._iterations.add(num_tokens, ended - began)
            self._recent.add(ended - began)
            if outputs:
                self._alone = min(self._alone, ended - began)
        for output in outputs:
            first, _, count = self._tokens.get(output.request, (ended, ended, 0))
            self._tokens[output.request] = first, ended, count + 1
            if output.finish_reason is not None:
                self._finished(output.request)
        return outputs

    def forget(self, request: CountedRequest) -> None:
        """A request was aborted."""
        self._tokens.pop(request, None)

    def fill(self, must_stop: Callable[[], bool]) -> None:
        """Run units while there is time, or a single one if nothing is being served.

        Args:
            must_stop: asked after each unit; True if somebody waits for the engine.
        """
        while (unit := self.work.unit) is not None:
            size = self._size(unit, min(self.budget(), self.settings.max_unit_ms / 1e3))
            if size == 0:
                return
            began = self._now()
            self.work.run_unit(size)
            seconds = self._now() - began
            self.seconds += seconds
            self._units.setdefault(unit, TimeLine()).add(size, seconds)
            if must_stop() or not self.core.has_unfinished:
                return

    def budget(self) -> float:
        """Seconds until the next iteration must begin; infinite if nothing is being served."""
        scheduler = self.core.scheduler
        if not self.core.has_unfinished:
            return math.inf
        now, budget = self._now(), math.inf
        decoding = [s for s in scheduler.running if s in self._tokens and s.num_new == 1]
        if decoding:
            objective = self.objective * (1 - self.token_reserve.part)
            for request in decoding:
                first, last, count = self._tokens[request]
                budget = min(budget, first + count * objective - now, last + _MOST_GAP * objective - now)
            budget -= self._recent.expected
        late = [s for s in scheduler if s.num_new > 1 or s not in self._tokens]
        if late:
            if self.settings.ttft_ms is None or not self._iterations:
                return -math.inf
            objective = self.settings.ttft_ms / 1e3 * (1 - self.first_reserve.part)
            num_new = 0
            # in the order in which they will be computed
            for request in late:
                num_new += request.num_new
                budget = min(budget, request.arrived + objective - now - self._prompt_seconds(num_new, len(decoding)))
        return budget

    @property
    def objective(self) -> float:
        """Seconds per token."""
        tpot_ms = self.settings.tpot_ms
        return 2 * self._alone if tpot_ms is None else tpot_ms / 1e3

    def _prompt_seconds(self, num_tokens: int, num_decoding: int) -> float:
        """Seconds until this many prompt tokens are computed, iteration by iteration, beside others' next tokens."""
        most = self.core.settings.max_num_batched_tokens
        room = max(1, most - num_decoding)
        full, rest = divmod(num_tokens, room)
        return full * self._iterations(most) + self._iterations(rest + num_decoding)

    def _size(self, unit: Hashable, seconds: float) -> int:
        """Tokens of a unit that ends within a time; 0 if it should not run now."""
        left = min(self.work.num_left, _MOST_TOKENS)
        times = self._units.get(unit)
        longest = self.settings.max_unit_ms / 1e3
        if times is None:
            # nothing is known of it: a small one, once there is half the time that there often is
            pause = self.objective - self._recent.expected
            usual = min(longest, pause) if pause > 0 else longest
            return min(left, _PROBE_TOKENS) if seconds >= usual / 2 else 0
        least = min(left, _FEWEST_TOKENS)
        fixed = max(times(0), 0.0)
        a_token = max((times(_MOST_TOKENS) - fixed) / _MOST_TOKENS, 1e-9)
        size = min(left, int((seconds - fixed) / a_token)) if seconds > fixed else 0
        enough = min(left, int((longest - fixed) / a_token), math.ceil(fixed * (1 / _MOST_FIXED - 1) / a_token))
        if size >= max(least, enough):
            return math.ceil(left / math.ceil(left / size))  # as large as those that are to follow
        # even the smallest unit may take longer than the longest: then it waits for a pause
        return least if seconds == longest and least * a_token + fixed > longest else 0

    def _finished(self, request: CountedRequest) -> None:
        first, last, count = self._tokens.pop(request)
        self.first_reserve.learn(first - request.arrived <= (self.settings.ttft_ms or math.inf) / 1e3)
        if count > 1:
            self.token_reserve.learn((last - first) / (count - 1) <= self.objective)

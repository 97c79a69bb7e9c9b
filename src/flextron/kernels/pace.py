"""How many threads an iteration runs on: as many as have been the fastest lately.

The kernels meet at barriers several times a layer. Where another process holds one core, or a container's limit holds
all, a barrier waits for whole time slices, and fewer threads are faster than many. What holds now is measured: the
times of the iterations themselves, over the work that they did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ThreadPace"]

_KEPT = 0.7
"""Weight of what was measured before, against the newest measurement."""
_MARGIN = 0.9
"""Another number of threads must take less than this part of the time to be used."""
_CHANGE = 1.3
"""Times the usual time that make fewer threads worth a trial at once; when it falls as much, more threads are."""
_USUAL_KEPT = 0.98
"""Weight of the past in the usual time."""
_TRIAL = 2
"""Iterations of a trial; the better one counts, for the first may have to wake a thread."""
_HOPELESS = 1.4
"""Times the present time after which the first iteration of a trial is enough."""
_SOONEST, _LATEST = 1.0, 16.0
"""Seconds between two trials of a number of threads: they double with each that has failed."""
_TRIALS_SHARE = 0.03
"""Part of the time that failed trials may cost."""


@dataclass(slots=True)
class _Choice:
    """What is known of one number of threads."""

    seconds: float | None = None
    """Seconds of a unit of work lately."""
    pause: float = _SOONEST
    next_trial: float = 0.0

    def postpone(self, now: float, lost: float = 0.0) -> None:
        """Wait twice as long as the last time before the next trial, or longer if the last one has lost much time."""
        self.next_trial = now + max(self.pause, lost / _TRIALS_SHARE)
        self.pause = min(2 * self.pause, _LATEST)


class ThreadPace:
    """Chooses among 1 to `most` threads; tries the neighbours of the present number now and then."""

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin with all threads."""
        self._choices = [_Choice() for _ in range(most)]
        self._clock = clock
        self.threads = most
        """The number that is thought the fastest."""
        self._usual: float | None = None
        """Time of a unit of work with `threads` over the last fifty iterations or so."""
        self._trial: int | None = None
        self._trial_seconds: list[float] = []
        self._lost = 0.0
        """Seconds that the trial took beyond what was to be expected."""
        for choice in self._choices:
            choice.postpone(clock())

    @property
    def most(self) -> int:
        """The most threads among which it chooses."""
        return len(self._choices)

    def choose(self) -> int:
        """Threads for the next iteration."""
        if self._trial is None:
            self._trial = self._next_trial()
            self._trial_seconds, self._lost = [], 0.0
        return self.threads if self._trial is None else self._trial

    def learn(self, work: float, seconds: float) -> None:
        """Take in the time of an iteration with the threads that were chosen last.

        Args:
            work: how much there was to do, in any unit.
            seconds: its time.
        """
        each = seconds / max(work, 1e-9)
        if self._trial is not None:
            self._learn_of_trial(self._trial, each, work)
            return
        own = self._choices[self.threads - 1]
        own.seconds = each if own.seconds is None else _KEPT * own.seconds + (1 - _KEPT) * each
        self._usual = each if self._usual is None else _USUAL_KEPT * self._usual + (1 - _USUAL_KEPT) * each

    def _learn_of_trial(self, trial: int, each: float, work: float) -> None:
        choice, own = self._choices[trial - 1], self._choices[self.threads - 1]
        assert own.seconds is not None
        self._trial_seconds.append(each)
        self._lost += work * (each - own.seconds)
        if len(self._trial_seconds) < _TRIAL and each < _HOPELESS * own.seconds:
            return
        choice.seconds = min(self._trial_seconds)
        self._trial = None
        if choice.seconds < _MARGIN * own.seconds:
            # the number that was left is tried again soon: what slowed it may end at any time
            own.pause = _SOONEST
            own.postpone(self._clock())
            self.threads, self._usual = trial, choice.seconds
        else:
            choice.postpone(self._clock(), self._lost)

    def _next_trial(self) -> int | None:
        """A neighbour whose turn it is."""
        now, own = self._clock(), self._choices[self.threads - 1]
        if own.seconds is None or self._usual is None:
            return None
        has_changed = {-1: own.seconds > _CHANGE * self._usual, 1: _CHANGE * own.seconds < self._usual}
        if any(has_changed.values()):
            self._usual = own.seconds
        for step, is_due in has_changed.items():
            trial = self.threads + step
            if 1 <= trial <= len(self._choices) and (is_due or now >= self._choices[trial - 1].next_trial):
                return trial
        return None

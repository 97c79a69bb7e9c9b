"""Hands the steps of jobs to the thread that has time for them, and keeps their books in a thread of its own.

Books mean the database, the disk and whose turn it is: nothing that a server's iterations could wait for. A trainer is
in one thread's hands at a time: the driver gives it away for one step, and takes it back with the step's metrics.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from flextron.finetuning.trainer import StepMetrics, Trainer
from flextron.jobs.jobs import Jobs
from flextron.jobs.running_job import RunningJob

__all__ = ["TrainingDriver"]

_log = logging.getLogger("flextron.server")
_REST_SECONDS = 0.5


class TrainingDriver(threading.Thread):
    """Work for `flextron.engine.coserving`; `unit`, `num_left` and `run` belong to the thread that trains."""

    def __init__(self, jobs: Jobs, on_work: Callable[[], None] = lambda: None) -> None:
        """Take the jobs.

        Args:
            jobs: whose trainers take steps unit by unit.
            on_work: called, in the driver's thread, when there is a step to take.
        """
        super().__init__(name="flextron-jobs", daemon=True)
        self._scheduler, self._on_work = jobs.scheduler, on_work
        self._run: RunningJob | None = None
        """Whose step is to be taken."""
        self._outcome: StepMetrics | Exception | None = None
        self._is_taken, self._is_ending = threading.Event(), threading.Event()
        self.num_tokens = 0
        """Trained so far."""

    @property
    def unit(self) -> str | None:
        """Kind of the next unit; None while there is nothing to train."""
        return None if self._run is None else self._trainer.unit

    @property
    def num_left(self) -> int:
        """Tokens that the next unit can have at most."""
        return self._trainer.num_left

    def run_unit(self, num_tokens: int) -> None:
        """Run the next unit with at most so many tokens."""
        try:
            self._outcome = self._trainer.run(num_tokens)
        except Exception as error:
            self._outcome = error
        if self._outcome is not None:
            if isinstance(self._outcome, StepMetrics):
                self.num_tokens += self._outcome.num_tokens
            self._run = None
            self._is_taken.set()

    @property
    def _trainer(self) -> Trainer:
        assert self._run is not None
        return self._run.trainer

    def run(self) -> None:
        """Keep the books."""
        while not self._is_ending.is_set():
            try:
                run = self._scheduler.next()
                if run is None:
                    self._scheduler.wait(_REST_SECONDS)
                    continue
                self._give(run)
            except Exception:
                # of the database, as no job's own error comes here: it may be well again later
                _log.exception("training rests")
                self._is_ending.wait(_REST_SECONDS)

    def stop(self) -> None:
        """End the thread; the step that has begun is taken again another time."""
        self._is_ending.set()
        self._is_taken.set()
        self._scheduler.wake()
        self.join()
        self._run = None

    def _give(self, run: RunningJob) -> None:
        self._is_taken.clear()
        self._outcome, self._run = None, run
        if self._is_ending.is_set():
            return
        self._on_work()
        self._is_taken.wait()
        # a step that was taken is written down even at the end, or its trainer would be a step ahead of the books; None
        # if it was not taken
        outcome = self._outcome
        if isinstance(outcome, StepMetrics):
            self._scheduler.record(run, outcome)
        elif outcome is not None:
            self._scheduler.fail(run, outcome)

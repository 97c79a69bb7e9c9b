"""Jobs that train, one step each in turn, and what becomes of each step.

All methods but the last ones belong to the thread that trains. For each step it calls `next`, then the trainer's own
methods, then `record` or `fail`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from flextron.errors import FlextronError
from flextron.files import NoSpaceError
from flextron.finetuning.trainer import MakeTrainer, StepMetrics
from flextron.jobs.attempts import Attempts
from flextron.jobs.directory import StateDirectory
from flextron.jobs.loader import Preparer
from flextron.jobs.records import ALIVE, ENDED, Status
from flextron.jobs.repository import JobRepository
from flextron.jobs.running_job import RunningJob
from flextron.jobs.uploads import Uploads

__all__ = ["FairShare", "JobScheduler"]

_log = logging.getLogger("flextron.server")
_STALL_SECONDS = 5.0
"""Rest after the disk was too full even to say so."""


class FairShare:
    """Stride scheduling: every job in training gets the same number of trained tokens over time.

    Each job has a pass, the tokens that it has had; the job with the lowest pass goes next. Between two jobs that are
    both there all the time, passes never differ by more than the largest step. A job that joins starts at the lowest
    pass of the others, so that it neither catches up on what it missed nor waits.
    """

    def __init__(self) -> None:
        """No job yet."""
        self._passes: dict[str, int] = {}

    def keep(self, job_ids: Iterable[str]) -> None:
        """These jobs take turns from now on; others leave."""
        wanted = list(job_ids)
        stay = {i: self._passes[i] for i in wanted if i in self._passes}
        start = min(stay.values(), default=0)
        self._passes = {i: stay.get(i, start) for i in wanted}

    def next(self) -> str | None:
        """The job whose turn it is, the first kept of those that are equal; None if there is no job."""
        return min(self._passes, key=self._passes.__getitem__, default=None)

    def charge(self, job_id: str, num_tokens: int) -> None:
        """A job had so many tokens."""
        # a step without a token still was a turn
        self._passes[job_id] += max(1, num_tokens)


class JobScheduler:
    """Trainers of the jobs that train now, and whose turn it is."""

    def __init__(
        self,
        directory: StateDirectory,
        repository: JobRepository,
        attempts: Attempts,
        uploads: Uploads,
        preparer: Preparer,
        make_trainer: MakeTrainer,
        news: threading.Event,
        naming: threading.RLock,
        *,
        max_training: int,
        save_seconds: float,
        on_adapter: Callable[[str, int], None],
    ) -> None:
        """No job trains yet.

        Args:
            directory: where trainers' states and adapters go.
            repository: where jobs come from, and what is told how it went.
            attempts: told what is being tried.
            uploads: takes results.
            preparer: has the jobs' examples.
            make_trainer: called for each job.
            news: set when something changes that `next` should know.
            naming: held from before an adapter is entered until `on_adapter` was told.
            max_training: jobs at once.
            save_seconds: between two saved states of a job.
            on_adapter: told of a job and the step after which it has a new adapter.
        """
        self._directory, self._repository, self._uploads, self._preparer = directory, repository, uploads, preparer
        self._make_trainer, self._news, self._on_adapter, self._naming = make_trainer, news, on_adapter, naming
        self._max_training, self._save_seconds, self._attempts = max_training, save_seconds, attempts
        self._runs: dict[str, RunningJob] = {}
        self._fair_share = FairShare()
        self._stalled_until = 0.0

    def next(self) -> RunningJob | None:
        """The job whose turn it is; None if none is ready. Each must be followed by `record` or `fail`.

        Raises:
            NoSpaceError: the disk is full; ask again later.
        """
        if time.monotonic() < self._stalled_until:
            return None
        held = self._preparer.held()
        waiting = dict(self._repository.with_status(Status.QUEUED, Status.RUNNING))
        self._preparer.drop(held, but=waiting.keys() - self._runs.keys())
        for run in [run for job_id, run in self._runs.items() if job_id not in waiting]:
            self._drop(run)
        for job_id, status in waiting.items():
            self._begin(job_id, status)
        self._fair_share.keep(self._runs)
        chosen = self._fair_share.next()
        if chosen is None:
            return None
        run = self._runs[chosen]
        if not run.has_stepped:
            try:
                self._attempts.begin(chosen, "stepping")
            except FlextronError as error:
                self.fail(run, error)
                return None
        return run

    def record(self, run: RunningJob, metrics: StepMetrics) -> None:
        """Keep what the step that `run.trainer` took has given."""
        self._end_attempt(run)
        # a forward pass is a third of a step's work
        self._fair_share.charge(run.job.id, metrics.num_tokens + metrics.num_valid_tokens // 3)
        with self._naming:
            try:
                step = run.record(metrics, self._save_seconds)
            except Exception as error:
                self.fail(run, error)
                return
            if step is not None:
                self._on_adapter(run.job.id, step)
        if run.trainer.step_number >= run.trainer.num_steps:
            del self._runs[run.job.id]
            if self._repository.get(run.job.id).status in ENDED:
                run.forget()

    def fail(self, run: RunningJob, error: Exception) -> None:
        """A job cannot go on: it is paused if the disk is full, and has failed else."""
        self._runs.pop(run.job.id, None)
        self._end_attempt(run)
        if self._end(run.job.id, error):
            run.forget()

    def wait(self, seconds: float) -> None:
        """Wait until something changes that `next` should know, or for so long."""
        self._news.wait(seconds)
        self._news.clear()

    def save(self) -> None:
        """Save what is in training; the training thread must have ended."""
        for run in self._runs.values():
            self._end_attempt(run)
        unfinished = dict(self._repository.with_status(*ALIVE, Status.PAUSED))
        try:
            for run in [run for job_id, run in self._runs.items() if job_id in unfinished]:
                run.save()
        except NoSpaceError:
            _log.exception("jobs will go on from states saved before")

    def _begin(self, job_id: str, status: Status) -> None:
        """Let a job train, if it is ready and there is room."""
        if job_id not in self._runs:
            prepared = self._preparer.take(job_id) if len(self._runs) < self._max_training else None
            if prepared is None:
                return
            try:
                job = self._repository.get(job_id)
                with self._attempts.at_work(job_id, "making"):
                    run = RunningJob(
                        job, prepared, self._make_trainer, self._directory, self._repository, self._uploads
                    )
            except Exception as error:
                self._end(job_id, error)
                return
            self._runs[job_id] = run
            if status == Status.RUNNING:
                self._repository.tell(job_id, f"resumed after step {run.trainer.step_number}")
        if status == Status.QUEUED:
            message = f"training goes on after step {self._runs[job_id].trainer.step_number}"
            self._repository.change(job_id, before=(Status.QUEUED,), to=Status.RUNNING, message=message)

    def _end_attempt(self, run: RunningJob) -> None:
        if not run.has_stepped:
            run.has_stepped = True
            self._attempts.end(run.job.id, "stepping")

    def _end(self, job_id: str, error: Exception) -> bool:
        """Write down that a job cannot go on; whether it has failed for good."""
        try:
            if not isinstance(error, NoSpaceError):
                self._repository.fail(job_id, error)
                return True
            message = f"paused at its last saved state: {error}"
            before = (Status.QUEUED, Status.RUNNING)
            self._repository.change(job_id, before=before, to=Status.PAUSED, message=message, level="error")
        except NoSpaceError:
            # the job is still running in the database, so it goes on from its saved state when there is room
            _log.exception("job %s waits for room on the disk", job_id)
            self._stalled_until = time.monotonic() + _STALL_SECONDS
            self._preparer.submit(job_id)
        return False

    def _drop(self, run: RunningJob) -> None:
        """A client has paused or ended a job."""
        del self._runs[run.job.id]
        if self._repository.get(run.job.id).status in ENDED:
            run.forget()
            return
        try:
            run.save()
        except NoSpaceError as error:
            self._repository.tell(run.job.id, f"rests at its last saved state: {error}", "error")

    # what any thread may ask

    def is_training(self, job_id: str) -> bool:
        """Whether a job has a trainer, which may be about to write its state."""
        return job_id in self._runs

    def estimated_finish(self, job_id: str) -> int | None:
        """Unix time at which a job should finish; None while that is unknown."""
        run = self._runs.get(job_id)
        return None if run is None else run.estimated_finish()

    def wake(self) -> None:
        """End a `wait`."""
        self._news.set()

"""All jobs of a model: clients make and change them from any thread, one thread trains them step by step.

That thread calls `step` while it has time for training, or, to cut a step into smaller pieces, `next`, then the
trainer's own methods, then `record` or `fail`.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.files import NoSpaceError
from flextron.jobs.directory import StateDirectory
from flextron.jobs.hyperparameters import Hyperparameters
from flextron.jobs.journal import Journal
from flextron.jobs.preparer import Preparer
from flextron.jobs.records import ALIVE, ENDED, Checkpoint, Job, Status
from flextron.jobs.run import Run
from flextron.jobs.shares import Shares
from flextron.jobs.store import Store
from flextron.jobs.trainer import MakeTrainer, StepMetrics
from flextron.jobs.uploads import Uploads

__all__ = ["Jobs", "JobsSettings", "OnAdapter", "OnDeleted"]

_log = logging.getLogger("flextron.server")
_STALL_SECONDS = 5.0
"""Rest after the disk was too full even to say so."""

OnAdapter = Callable[[Checkpoint, Path], None]
"""Told of each adapter and its directory, which holds all of it and never changes."""
OnDeleted = Callable[[Checkpoint], None]
"""Told of an adapter that is going to vanish."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsSettings:
    """What the operator decides."""

    max_training: int = 8
    """Jobs that train at once; others wait in their order."""
    save_seconds: float = 30.0
    """Between two saved states of a job: so much is trained again after a crash."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_training < 1 or not 0 <= self.save_seconds < float("inf"):
            raise FlextronError("max_training must be at least 1, and save_seconds a number of at least 0")


class Jobs:
    """Jobs and files in a state directory."""

    def __init__(
        self,
        path: Path,
        *,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        make_trainer: MakeTrainer,
        fingerprint: str | None = None,
        on_adapter: OnAdapter = lambda checkpoint, directory: None,
        on_deleted: OnDeleted = lambda checkpoint: None,
        settings: JobsSettings | None = None,
    ) -> None:
        """Open a state directory, or make it, and go on with its jobs.

        Args:
            path: of the directory.
            model: the base model's name.
            tokenizer: of the model; used by a thread of its own, so nobody else may use this object.
            context: positions of the model.
            make_trainer: called for each job by the thread that calls `step`.
            fingerprint: of the model's weights; by default the name alone says whose the directory is.
            on_adapter: called for each adapter that is there already, now, and for each new one by the training thread.
            on_deleted: called before an adapter's files are removed.
            settings: limits.

        Raises:
            FlextronError: another process has the directory, it is damaged, or its jobs are for another model
                or for other weights.
        """
        self.model, self.context, self._make_trainer = model, context, make_trainer
        self._on_adapter, self._on_deleted = on_adapter, on_deleted
        self.settings = settings or JobsSettings()
        self._directory = StateDirectory(path)
        try:
            self._store = Store(self._directory.database)
        except BaseException:
            self._directory.close()
            raise
        try:
            self.uploads, self.journal = Uploads(self._directory, self._store), Journal(self._store)
            if others := self.journal.models() - {model}:
                raise FlextronError(
                    f"the state directory {path} is of the model {min(others)!r}; serve it under this name, "
                    "or use another directory"
                )
            if fingerprint is not None and not self.journal.is_of(fingerprint):
                raise FlextronError(
                    f"the state directory {path} is of other weights than those that are called {model!r} now, and so "
                    "are its jobs and adapters; give another one (--state-directory), or serve the weights of before"
                )
        except BaseException:
            self._store.close()
            self._directory.close()
            raise
        self._runs: dict[str, Run] = {}
        self._shares = Shares()
        self._news, self._naming = threading.Event(), threading.Lock()
        self._stalled_until = 0.0
        self._preparer = Preparer(self.journal, self.uploads, tokenizer, context, self._news.set)
        self._directory.remove_states(but=[job_id for job_id, _ in self.journal.with_status(*ALIVE, Status.PAUSED)])
        for gone in self.journal.all_checkpoints(deleted=True):
            self._directory.remove_adapter(gone.job_id, gone.step)
        for checkpoint in self.journal.all_checkpoints():
            self._announce(checkpoint)
        for job_id, _ in self.journal.with_status(*ALIVE):
            self._preparer.submit(job_id)

    # what clients do

    def create(
        self,
        *,
        training_file: str,
        validation_file: str | None = None,
        suffix: str | None = None,
        hyperparameters: Hyperparameters | None = None,
        seed: int | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Job:
        """Take a job; its files are read soon after.

        Raises:
            FlextronError: a file is unknown, the suffix taken, or a hyperparameter does not go with the model.
        """
        chosen = hyperparameters or Hyperparameters()
        if chosen.max_tokens is not None and chosen.max_tokens > self.context:
            raise FlextronError(f"max_tokens is {chosen.max_tokens}, but the model has {self.context} positions")
        job = self.journal.create(
            model=self.model,
            suffix=suffix,
            training_file=training_file,
            validation_file=validation_file,
            hyperparameters=chosen,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            metadata=metadata or {},
        )
        self._preparer.submit(job.id)
        return job

    def cancel(self, job_id: str) -> Job:
        """End a job for good; what it has learnt is dropped, but for its checkpoints.

        Raises:
            UnknownIdError: there is none.
            FlextronError: it has ended already.
        """
        before = (*ALIVE, Status.PAUSED)
        job = self._change(job_id, before, Status.CANCELLED, "the job was cancelled", "cancelled")
        if job.id not in self._runs:
            self._directory.remove_state(job.id)
        return job

    def pause(self, job_id: str) -> Job:
        """Let a job rest after the step that runs; errors as for `cancel`."""
        return self._change(job_id, ALIVE, Status.PAUSED, "the job was paused", "paused")

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on; errors as for `cancel`."""
        job = self._change(job_id, (Status.PAUSED,), Status.QUEUED, "the job goes on", "resumed")
        self._preparer.submit(job.id)
        return job

    def delete_adapter(self, name: str) -> None:
        """Delete a finished adapter, or an intermediate one, for good.

        Raises:
            UnknownIdError: there is none of this name.
        """
        with self._naming:
            checkpoint = self.journal.delete_checkpoint(name)
            self._on_deleted(checkpoint)
        self._directory.remove_adapter(checkpoint.job_id, checkpoint.step)

    def estimated_finish(self, job_id: str) -> int | None:
        """Unix time; None while nothing lets expect it."""
        run = self._runs.get(job_id)
        return None if run is None else run.estimated_finish()

    def _change(self, job_id: str, before: Sequence[Status], to: Status, message: str, done: str) -> Job:
        job = self.journal.get(job_id)
        if not self.journal.change(job.id, before=before, to=to, message=message):
            status = self.journal.get(job_id).status.value
            raise FlextronError(f"the job is {status}, so it cannot be {done}")
        self._news.set()
        return self.journal.get(job_id)

    # what the training thread does

    def step(self) -> bool:
        """Take an optimizer step of the job whose turn it is; False if there is none to take."""
        run = self.next()
        if run is None:
            return False
        try:
            metrics = run.trainer.step()
        except Exception as error:
            self.fail(run, error)
        else:
            self.record(run, metrics)
        return True

    def next(self) -> Run | None:
        """The job whose turn it is; None if none is ready. Each must be followed by `record` or `fail`.

        Raises:
            NoSpaceError: the disk is full; ask again later.
        """
        if time.monotonic() < self._stalled_until:
            return None
        held = self._preparer.held()
        waiting = dict(self.journal.with_status(Status.QUEUED, Status.RUNNING))
        self._preparer.drop(held, but=waiting.keys() - self._runs.keys())
        for run in [run for job_id, run in self._runs.items() if job_id not in waiting]:
            self._drop(run)
        for job_id, status in waiting.items():
            self._begin(job_id, status)
        self._shares.keep(self._runs)
        chosen = self._shares.next()
        return None if chosen is None else self._runs[chosen]

    def record(self, run: Run, metrics: StepMetrics) -> None:
        """Keep what the step that `run.trainer` took has given."""
        # a forward pass is a third of a step's work
        self._shares.charge(run.job.id, metrics.num_tokens + metrics.num_valid_tokens // 3)
        try:
            step = run.record(metrics, self.settings.save_seconds)
        except Exception as error:
            self.fail(run, error)
            return
        if run.trainer.step_number >= run.trainer.num_steps:
            del self._runs[run.job.id]
            if self.journal.get(run.job.id).status in ENDED:
                run.forget()
        if step is not None:
            with self._naming:
                made = self.journal.checkpoint(run.job.id, step)
                if made is not None:
                    self._announce(made)

    def fail(self, run: Run, error: Exception) -> None:
        """A job cannot go on: it is paused if the disk is full, and has failed else."""
        self._runs.pop(run.job.id, None)
        if self._end(run.job.id, error):
            run.forget()

    def wait(self, seconds: float) -> None:
        """Wait until something changes that `step` should know, or for so long."""
        self._news.wait(seconds)
        self._news.clear()

    def wake(self) -> None:
        """End a `wait`; callable from any thread."""
        self._news.set()

    def close(self) -> None:
        """Save what is in training and give the directory back; the training thread must have ended."""
        self._preparer.close()
        unfinished = dict(self.journal.with_status(*ALIVE, Status.PAUSED))
        try:
            for run in [run for job_id, run in self._runs.items() if job_id in unfinished]:
                run.save()
        except NoSpaceError:
            _log.exception("jobs will go on from states saved before")
        self._store.close()
        self._directory.close()

    def _begin(self, job_id: str, status: Status) -> None:
        """Let a job train, if it is ready and there is room."""
        if job_id not in self._runs:
            prepared = self._preparer.take(job_id) if len(self._runs) < self.settings.max_training else None
            if prepared is None:
                return
            try:
                job = self.journal.get(job_id)
                run = Run(job, prepared, self._make_trainer, self._directory, self.journal, self.uploads)
            except Exception as error:
                self._end(job_id, error)
                return
            self._runs[job_id] = run
            if status == Status.RUNNING:
                self.journal.tell(job_id, f"resumed after step {run.trainer.step_number}")
        if status == Status.QUEUED:
            message = f"training goes on after step {self._runs[job_id].trainer.step_number}"
            self.journal.change(job_id, before=(Status.QUEUED,), to=Status.RUNNING, message=message)

    def _end(self, job_id: str, error: Exception) -> bool:
        """Write down that a job cannot go on; whether it has failed for good."""
        try:
            if not isinstance(error, NoSpaceError):
                self.journal.fail(job_id, error)
                return True
            message = f"paused at its last saved state: {error}"
            before = (Status.QUEUED, Status.RUNNING)
            self.journal.change(job_id, before=before, to=Status.PAUSED, message=message, level="error")
        except NoSpaceError:
            # the job is still running in the database, so it goes on from its saved state when there is room
            _log.exception("job %s waits for room on the disk", job_id)
            self._stalled_until = time.monotonic() + _STALL_SECONDS
            self._preparer.submit(job_id)
        return False

    def _drop(self, run: Run) -> None:
        """A client has paused or ended a job."""
        del self._runs[run.job.id]
        if self.journal.get(run.job.id).status in ENDED:
            run.forget()
            return
        try:
            run.save()
        except NoSpaceError as error:
            self.journal.tell(run.job.id, f"rests at its last saved state: {error}", "error")

    def _announce(self, checkpoint: Checkpoint) -> None:
        try:
            self._on_adapter(checkpoint, self._directory.adapter(checkpoint.job_id, checkpoint.step))
        except Exception:
            _log.exception("the adapter %s cannot be served", checkpoint.name)

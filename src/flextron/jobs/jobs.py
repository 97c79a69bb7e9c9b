"""All jobs of a model: clients make and change them from any thread, one thread trains them (`scheduler`)."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import MakeTrainer
from flextron.jobs.attempts import Attempts
from flextron.jobs.database import Store
from flextron.jobs.directory import StateDirectory
from flextron.jobs.loader import Preparer
from flextron.jobs.records import ALIVE, Job, JobCheckpoint, Status
from flextron.jobs.repository import JobRepository
from flextron.jobs.scheduler import JobScheduler
from flextron.jobs.uploads import Uploads
from flextron.spec import SubnetSpec

__all__ = ["Jobs", "JobsSettings", "OnAdapter", "OnDeleted"]

_log = logging.getLogger("flextron.server")

OnAdapter = Callable[[JobCheckpoint, Path], None]
"""Told of each adapter and its directory, which holds all of it and never changes."""
OnDeleted = Callable[[JobCheckpoint], None]
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
        vocab_size: int | None = None,
        make_trainer: MakeTrainer,
        fingerprint: str | None = None,
        on_adapter: OnAdapter = lambda checkpoint, directory: None,
        on_deleted: OnDeleted = lambda checkpoint: None,
        settings: JobsSettings | None = None,
    ) -> None:
        """Open a state directory, or make it, and go on with its jobs.

        Args:
            path: path of the directory.
            model: the base model's name.
            tokenizer: tokenizer of the model; used by a thread of its own, so nobody else may use this object.
            context: positions of the model.
            vocab_size: tokens that the model knows; by default all that the tokenizer makes.
            make_trainer: called for each job by the thread that trains.
            fingerprint: fingerprint of the model's weights; by default the name alone says whose the directory is.
            on_adapter: called for each adapter that is there already, now, and for each new one by the training thread.
            on_deleted: called before an adapter's files are removed.
            settings: limits.

        Raises:
            FlextronError: another process has the directory, it is damaged, or its jobs are for another model
                or for other weights.
        """
        self.model, self.context = model, context
        self._on_adapter, self._on_deleted = on_adapter, on_deleted
        self.settings = settings or JobsSettings()
        self.directory = StateDirectory(path)
        try:
            self._store = Store(self.directory.database)
        except BaseException:
            self.directory.close()
            raise
        try:
            self.uploads, self.repository = Uploads(self.directory, self._store), JobRepository(self._store)
            if others := self.repository.models() - {model}:
                raise FlextronError(
                    f"the state directory {path} is of the model {min(others)!r}; serve it under this name, "
                    "or use another directory"
                )
            if fingerprint is not None and not self.repository.is_of(fingerprint):
                raise FlextronError(
                    f"the state directory {path} is of other weights than those that are called {model!r} now, and so "
                    "are its jobs and adapters; give another one (--state-directory), or serve the weights of before"
                )
        except BaseException:
            self._store.close()
            self.directory.close()
            raise
        news, self._naming = threading.Event(), threading.RLock()
        unfinished = [job_id for job_id, _ in self.repository.with_status(*ALIVE, Status.PAUSED)]
        attempts = Attempts(self.directory.attempts, unfinished)
        self.preparer = Preparer(
            self.repository, self.uploads, attempts, tokenizer, context, news.set, vocab_size=vocab_size
        )
        self.scheduler = JobScheduler(
            self.directory,
            self.repository,
            attempts,
            self.uploads,
            self.preparer,
            make_trainer,
            news,
            self._naming,
            max_training=self.settings.max_training,
            save_seconds=self.settings.save_seconds,
            on_adapter=self._announce_new,
        )
        """Schedules the jobs for the thread that trains."""
        self.directory.remove_states(but=unfinished)
        for gone in self.repository.all_checkpoints(deleted=True):
            self.directory.remove_adapter(gone.job_id, gone.step)
        for checkpoint in self.repository.all_checkpoints():
            self._announce(checkpoint)
        for job_id, _ in self.repository.with_status(*ALIVE):
            self.preparer.submit(job_id)

    def create(
        self,
        *,
        training_file: str,
        validation_file: str | None = None,
        suffix: str | None = None,
        hyperparameters: Hyperparameters | None = None,
        seed: int | None = None,
        metadata: dict[str, str] | None = None,
        spec: SubnetSpec | None = None,
    ) -> Job:
        """Take a job; its files are read soon after. It trains in the sub-network `spec`, by default the full one.

        Raises:
            FlextronError: a file is unknown, the suffix taken, or a hyperparameter does not go with the model.
        """
        chosen = hyperparameters or Hyperparameters()
        if chosen.max_tokens is not None and chosen.max_tokens > self.context:
            raise FlextronError(f"max_tokens is {chosen.max_tokens}, but the model has {self.context} positions")
        job = self.repository.create(
            model=self.model,
            suffix=suffix,
            training_file=training_file,
            validation_file=validation_file,
            hyperparameters=chosen,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            metadata=metadata or {},
            spec=spec,
        )
        self.preparer.submit(job.id)
        return job

    def get(self, job_id: str) -> Job:
        """A job; adapters that it names can be used.

        Raises:
            UnknownIdError: there is none.
        """
        with self._naming:
            return self.repository.get(job_id)

    def page(self, *, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """See `JobRepository.page`; adapters that the jobs name can be used."""
        with self._naming:
            return self.repository.page(after=after, limit=limit)

    def checkpoints(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobCheckpoint], bool]:
        """See `JobRepository.checkpoints`; the adapters can be used."""
        with self._naming:
            return self.repository.checkpoints(job_id, after=after, limit=limit)

    def cancel(self, job_id: str) -> Job:
        """End a job for good; what it has learnt is dropped, but for its checkpoints.

        Raises:
            UnknownIdError: there is none.
            FlextronError: it has ended already.
        """
        before = (*ALIVE, Status.PAUSED)
        job = self._change(job_id, before, Status.CANCELLED, "the job was cancelled", "cancelled")
        if not self.scheduler.is_training(job.id):
            self.directory.remove_state(job.id)
        return job

    def pause(self, job_id: str) -> Job:
        """Let a job rest after the step that runs; errors as for `cancel`."""
        return self._change(job_id, ALIVE, Status.PAUSED, "the job was paused", "paused")

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on; errors as for `cancel`."""
        job = self._change(job_id, (Status.PAUSED,), Status.QUEUED, "the job goes on", "resumed")
        self.preparer.submit(job.id)
        return job

    def wait_prepared(self, job_id: str, seconds: float = 60.0) -> None:
        """Wait until a job's files are read, or it has ended.

        Raises:
            FlextronError: it takes longer.
        """
        if not self.preparer.wait(job_id, seconds):
            raise FlextronError(f"the files of the job {job_id} were not read within {seconds:g} seconds; wait longer")

    def delete_adapter(self, name: str) -> None:
        """Delete a finished adapter, or an intermediate one, for good.

        Raises:
            UnknownIdError: there is none of this name.
        """
        with self._naming:
            checkpoint = self.repository.delete_checkpoint(name)
            self._on_deleted(checkpoint)
        self.directory.remove_adapter(checkpoint.job_id, checkpoint.step)

    def _change(self, job_id: str, before: Sequence[Status], to: Status, message: str, done: str) -> Job:
        job = self.repository.get(job_id)
        changed = self.repository.change(job.id, before=before, to=to, message=message)
        if changed is None:
            status = self.repository.get(job_id).status.value
            raise FlextronError(f"the job is {status}, so it cannot be {done}")
        self.scheduler.wake()
        return changed

    def close(self) -> None:
        """Save what is in training and give the directory back; the training thread must have ended."""
        self.preparer.close()
        self.scheduler.save()
        self._store.close()
        self.directory.close()

    def _announce_new(self, job_id: str, step: int) -> None:
        made = self.repository.checkpoint(job_id, step)
        if made is not None:
            self._announce(made)

    def _announce(self, checkpoint: JobCheckpoint) -> None:
        try:
            self._on_adapter(checkpoint, self.directory.adapter(checkpoint.job_id, checkpoint.step))
        except Exception:
            _log.exception("the adapter %s cannot be served", checkpoint.name)

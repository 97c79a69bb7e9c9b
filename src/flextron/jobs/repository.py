"""Jobs in the database: what they are, what happened to them, and what came out. Nothing here trains."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from flextron.errors import FlextronError
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import StepMetrics
from flextron.jobs.database import Store, UnknownIdError
from flextron.jobs.records import ALIVE, ENDED, File, Job, JobCheckpoint, JobError, JobEvent, Status, new_id
from flextron.jobs.uploads import FINE_TUNE, insert_file
from flextron.spec import SubnetSpec

__all__ = ["JobRepository"]

_MEASURED = ("loss", "accuracy", "num_tokens", "valid_loss", "valid_accuracy")
"""Columns of a step's row."""
_log = logging.getLogger("flextron.server")


class JobRepository:
    """Callable from any thread; what a method wrote is on the disk when it returns."""

    def __init__(self, store: Store) -> None:
        """Take the database."""
        self._store = store

    def create(
        self,
        *,
        model: str,
        suffix: str | None,
        training_file: str,
        validation_file: str | None,
        hyperparameters: Hyperparameters,
        seed: int,
        metadata: dict[str, str],
        spec: SubnetSpec | None = None,
    ) -> Job:
        """Enter a job, to be validated.

        Raises:
            FlextronError: another job has the suffix, or a file does not exist or is not for finetuning.
        """
        job_id, now = new_id("ftjob"), int(time.time())
        row = {
            "id": job_id,
            "created_at": now,
            "status": Status.VALIDATING,
            "model": model,
            "suffix": suffix,
            "training_file": training_file,
            "validation_file": validation_file,
            "hyperparameters": json.dumps(hyperparameters.to_dict()),
            "seed": seed,
            "metadata": json.dumps(metadata),
            "spec": None if spec is None else json.dumps(spec.to_dict()),
        }
        try:
            with self._store.transaction() as database:
                for file_id in (training_file, *([] if validation_file is None else [validation_file])):
                    file = database.execute("SELECT purpose FROM files WHERE id = ?", (file_id,)).fetchone()
                    if file is None or file["purpose"] != FINE_TUNE:
                        raise FlextronError(
                            f"there is no file {file_id[:100]!r} for finetuning; upload it with purpose {FINE_TUNE!r}"
                        )
                _insert(database, "jobs", row)
                _tell(database, job_id, f"created finetuning job {job_id}")
        except sqlite3.IntegrityError as error:
            raise FlextronError(f"another job has the suffix {suffix!r}; choose one of its own") from error
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """A job.

        Raises:
            UnknownIdError: there is none.
        """
        return Job.of(self._store.row("jobs", job_id))

    def page(self, *, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """A page of jobs, newest first, and whether more follow; errors as for `Store.page`, here and below."""
        rows, has_more = self._store.page("jobs", where={}, after=after, limit=limit)
        return [Job.of(row) for row in rows], has_more

    def events(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
        """A page of what happened, newest first."""
        where = {"job_id": self.get(job_id).id}
        rows, has_more = self._store.page("events", where=where, after=after, limit=limit)
        return [JobEvent.of(row) for row in rows], has_more

    def checkpoints(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobCheckpoint], bool]:
        """A page of adapters that were not deleted, newest first."""
        where = {"job_id": self.get(job_id).id, "is_deleted": 0}
        rows, has_more = self._store.page("checkpoints", where=where, after=after, limit=limit)
        return [JobCheckpoint.of(row) for row in rows], has_more

    def had_checkpoint(self, job_id: str, step: int) -> bool:
        """Whether there is an adapter after a step, or was one until it was deleted."""
        return bool(self._store.rows("SELECT 1 FROM checkpoints WHERE job_id = ? AND step = ?", job_id, step))

    def checkpoint(self, job_id: str, step: int) -> JobCheckpoint | None:
        """The adapter after a step; None if it was deleted."""
        query = "SELECT * FROM checkpoints WHERE job_id = ? AND step = ? AND is_deleted = 0"
        rows = self._store.rows(query, job_id, step)
        return JobCheckpoint.of(rows[0]) if rows else None

    def all_checkpoints(self, *, deleted: bool = False) -> list[JobCheckpoint]:
        """Checkpoints of all jobs, oldest first; either those that are there or those that were deleted."""
        rows = self._store.rows("SELECT * FROM checkpoints WHERE is_deleted = ? ORDER BY seq", deleted)
        return [JobCheckpoint.of(row) for row in rows]

    def delete_checkpoint(self, name: str) -> JobCheckpoint:
        """Enter that an adapter is deleted; the suffix of a job whose finished one it was is free again.

        Raises:
            UnknownIdError: no adapter has this name, or not any more.
        """
        query = "SELECT * FROM checkpoints WHERE name = ? AND is_deleted = 0"
        with self._store.transaction() as database:
            row = database.execute(query, (name,)).fetchone()
            if row is None:
                raise UnknownIdError(f"there is no adapter {name[:200]!r}")
            database.execute("UPDATE checkpoints SET is_deleted = 1 WHERE seq = ?", (row["seq"],))
            database.execute("UPDATE jobs SET is_deleted = 1 WHERE fine_tuned_model = ?", (name,))
            _tell(database, row["job_id"], f"deleted adapter: {name}")
        return JobCheckpoint.of(row)

    def is_of(self, fingerprint: str) -> bool:
        """Whether all this is of a model with these weights; the first that asks decides."""
        with self._store.transaction() as database:
            row = database.execute("SELECT fingerprint FROM weights").fetchone()
            if row is None:
                _insert(database, "weights", {"fingerprint": fingerprint})
        return row is None or row["fingerprint"] == fingerprint

    def models(self) -> set[str]:
        """Names of the base models of all jobs."""
        return {row["model"] for row in self._store.rows("SELECT DISTINCT model FROM jobs")}

    def with_status(self, *statuses: Status) -> list[tuple[str, Status]]:
        """Ids of jobs that have one of these, oldest first."""
        marks = ", ".join("?" * len(statuses))
        rows = self._store.rows(f"SELECT id, status FROM jobs WHERE status IN ({marks}) ORDER BY seq", *statuses)
        return [(row["id"], Status(row["status"])) for row in rows]

    def steps(self, job_id: str) -> list[tuple[int, StepMetrics]]:
        """What each recorded step measured."""
        rows = self._store.rows("SELECT * FROM steps WHERE job_id = ? ORDER BY step", job_id)
        return [(row["step"], StepMetrics(**{key: row[key] for key in _MEASURED})) for row in rows]

    def trained_tokens(self, job_id: str) -> int:
        """Trained tokens of all recorded steps."""
        (row,) = self._store.rows("SELECT COALESCE(SUM(num_tokens), 0) AS n FROM steps WHERE job_id = ?", job_id)
        return int(row["n"])

    def tell(self, job_id: str, message: str, level: str = "info") -> None:
        """Enter an event; the level is `info`, `warn` or `error`."""
        with self._store.transaction() as database:
            _tell(database, job_id, message, level)

    def change(
        self,
        job_id: str,
        *,
        before: Iterable[Status],
        to: Status,
        message: str,
        level: str = "info",
        error: JobError | None = None,
    ) -> Job | None:
        """Give a job another status, and return the job; None, and nothing happens, unless it has one of `before`."""
        allowed = tuple(before)
        with self._store.transaction() as database:
            if not _set_status(database, job_id, allowed, to, error):
                return None
            _tell(database, job_id, message, level)
            # another thread may change it at once
            return Job.of(database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())

    def fail(self, job_id: str, error: Exception, param: str | None = None) -> None:
        """A job cannot go on because of an error; `param` is the key of the request that is to blame."""
        if isinstance(error, FlextronError):
            message = str(error)
        else:
            _log.error("job %s has failed", job_id, exc_info=error)
            message = f"an unexpected error, of which the server's log says more: {type(error).__name__}"
        code = "training_failed" if param is None else f"invalid_{param}"
        told = JobError(message=message, code=code, param=param)
        self.change(
            job_id, before=(*ALIVE, Status.PAUSED), to=Status.FAILED, message=message, level="error", error=told
        )

    def record(self, job: Job, step: int, metrics: StepMetrics, *, num_steps: int, has_adapter: bool) -> bool:
        """Enter a step that is not the last, and its adapter if there is one; again changes nothing.

        Returns:
            Whether the job was still running, or just paused, maybe resumed already; if not, nothing happens.
        """
        with self._store.transaction() as database:
            (status,) = database.execute("SELECT status FROM jobs WHERE id = ?", (job.id,)).fetchone()
            if status not in (Status.RUNNING, Status.PAUSED, Status.QUEUED):
                return False
            _enter_step(database, job.id, step, metrics, num_steps)
            if has_adapter:
                _enter_checkpoint(database, job.id, step, metrics, job.name(step))
        return True

    def finish(self, job: Job, step: int, metrics: StepMetrics, result: File) -> bool:
        """Enter the last step and all that came out; False, and nothing happens, if the job is paused or has ended."""
        with self._store.transaction() as database:
            # queued is one that was paused and resumed during the step
            if not _set_status(database, job.id, (Status.RUNNING, Status.QUEUED), Status.SUCCEEDED, None):
                return False
            _enter_step(database, job.id, step, metrics, step)
            _enter_checkpoint(database, job.id, step, metrics, job.name())
            insert_file(database, result)
            values = (job.name(), result.id, job.id)
            database.execute("UPDATE jobs SET fine_tuned_model = ?, result_file = ? WHERE id = ?", values)
            _tell(database, job.id, f"new adapter: {job.name()}")
            _tell(database, job.id, "the job has succeeded")
        return True


def _set_status(
    database: sqlite3.Connection, job_id: str, before: tuple[Status, ...], to: Status, error: JobError | None
) -> bool:
    marks = ", ".join("?" * len(before))
    query = f"UPDATE jobs SET status = ?, finished_at = ?, error = ? WHERE id = ? AND status IN ({marks})"
    finished_at = int(time.time()) if to in ENDED else None
    told = None if error is None else json.dumps(asdict(error))
    return database.execute(query, (to, finished_at, told, job_id, *before)).rowcount == 1


def _tell(
    database: sqlite3.Connection,
    job_id: str,
    message: str,
    level: str = "info",
    kind: str = "message",
    data: dict[str, Any] | None = None,
) -> None:
    query = "INSERT INTO events (id, job_id, created_at, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?, ?)"
    values = (new_id("ftevent"), job_id, int(time.time()), level, kind, message, json.dumps(data or {}))
    database.execute(query, values)


def _insert(database: sqlite3.Connection, table: str, row: dict[str, Any], instead: str = "") -> bool:
    """Add a row; False if it is there already and `instead` says to ignore that."""
    marks = ", ".join("?" * len(row))
    query = f"INSERT {instead} INTO {table} ({', '.join(row)}) VALUES ({marks})"
    return database.execute(query, tuple(row.values())).rowcount == 1


def _enter_step(database: sqlite3.Connection, job_id: str, step: int, metrics: StepMetrics, num_steps: int) -> None:
    row = {"job_id": job_id, "step": step, **{key: getattr(metrics, key) for key in _MEASURED}}
    if not _insert(database, "steps", row, "OR IGNORE"):
        return  # taken again after a crash
    data = {"step": step, "train_loss": metrics.loss, "total_steps": num_steps, "num_tokens": metrics.num_tokens}
    message = f"step {step}/{num_steps}: training loss={metrics.loss:.4f}"
    if metrics.accuracy is not None:
        data["train_mean_token_accuracy"] = metrics.accuracy
    if metrics.valid_loss is not None:
        message += f", validation loss={metrics.valid_loss:.4f}"
        # it is always the whole file's, so that both of OpenAI's pairs of keys have it
        data |= {"valid_loss": metrics.valid_loss, "full_valid_loss": metrics.valid_loss}
        if metrics.valid_accuracy is not None:
            accuracy = metrics.valid_accuracy
            data |= {"valid_mean_token_accuracy": accuracy, "full_valid_mean_token_accuracy": accuracy}
    _tell(database, job_id, message, kind="metrics", data=data)


def _enter_checkpoint(database: sqlite3.Connection, job_id: str, step: int, metrics: StepMetrics, name: str) -> None:
    row = {"id": new_id("ftckpt"), "job_id": job_id, "created_at": int(time.time()), "step": step, "name": name}
    row |= {key: getattr(metrics, key) for key in ("loss", "accuracy", "valid_loss", "valid_accuracy")}
    _insert(database, "checkpoints", row, "OR IGNORE")

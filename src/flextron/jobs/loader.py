"""Reads the examples of jobs, in a thread of its own: tokenizing a large file takes a while.

Examples are kept in memory until training takes them. After a restart or a pause they are read again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.files import NoSpaceError
from flextron.finetuning.dataset import Dataset, read_dataset
from flextron.finetuning.example import Example
from flextron.jobs.attempts import Attempts
from flextron.jobs.records import ALIVE, Job, Status
from flextron.jobs.repository import JobRepository
from flextron.jobs.uploads import Uploads

__all__ = ["Prepared", "Preparer"]

_log = logging.getLogger("flextron.server")
_REST_SECONDS = 1.0
"""Time until the disk may have room again."""


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """What a job's files hold."""

    examples: Sequence[Example]
    validation: Sequence[Example] = ()


class Preparer:
    """Jobs in, examples out; callable from any thread."""

    def __init__(
        self,
        repository: JobRepository,
        uploads: Uploads,
        attempts: Attempts,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        on_change: Callable[[], None],
        *,
        vocab_size: int | None = None,
    ) -> None:
        """Take what reading needs.

        Args:
            repository: told how it went.
            uploads: where the files are.
            attempts: told what is being read.
            tokenizer: used by nobody else.
            context: positions of the model.
            on_change: called, by the thread that reads, when a job is ready or has failed.
            vocab_size: tokens that the model knows; by default all that the tokenizer makes.
        """
        self._repository, self._uploads, self._tokenizer, self._context = repository, uploads, tokenizer, context
        self._attempts, self._vocab_size = attempts, vocab_size
        self._on_change = on_change
        self._prepared: dict[str, Prepared] = {}
        self._lock, self._is_ending = threading.Condition(), threading.Event()
        self._pool = ThreadPoolExecutor(1, "flextron-datasets")

    def submit(self, job_id: str) -> None:
        """Read a job's examples soon."""
        self._pool.submit(self._run, job_id)

    def take(self, job_id: str) -> Prepared | None:
        """A job's examples, once; None if they are not there."""
        with self._lock:
            return self._prepared.pop(job_id, None)

    def held(self) -> dict[str, Prepared]:
        """What waits to be taken."""
        with self._lock:
            return dict(self._prepared)

    def wait(self, job_id: str, seconds: float) -> bool:
        """Wait until a job's examples are there or it is known that they will not be; False if that takes longer."""

        def is_settled() -> bool:
            return job_id in self._prepared or self._repository.get(job_id).status not in ALIVE

        with self._lock:
            return self._lock.wait_for(is_settled, seconds)

    def drop(self, held: dict[str, Prepared], *, but: Container[str]) -> None:
        """Let go of what `held` returned, unless the job is one of these or its examples were read again since."""
        with self._lock:
            for job_id, prepared in held.items():
                if job_id not in but and self._prepared.get(job_id) is prepared:
                    del self._prepared[job_id]

    def close(self) -> None:
        """End after the file that is being read."""
        self._is_ending.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job_id: str) -> None:
        while not self._is_ending.is_set():
            job = self._repository.get(job_id)
            if job.status not in ALIVE:
                return
            try:
                self._prepare(job)
                self._on_change()
                with self._lock:
                    self._lock.notify_all()
                return
            except NoSpaceError:
                _log.exception("job %s waits for room on the disk", job_id)
                time.sleep(_REST_SECONDS)

    def _prepare(self, job: Job) -> None:
        try:
            with self._attempts.at_work(job.id, "reading"):
                training = self._read(job, job.training_file, "training_file")
                validation = None
                if training is not None and job.validation_file is not None:
                    validation = self._read(job, job.validation_file, "validation_file")
        except FlextronError as error:  # it was tried too often
            self._repository.fail(job.id, error, param="training_file")
            return
        if training is None or (validation is None and job.validation_file is not None):
            return
        message = f"the file holds {len(training.examples)} examples"
        if validation is not None:
            message += f", that for validation {len(validation.examples)}"
        message += "; the job waits for its turn"
        self._repository.change(job.id, before=(Status.VALIDATING,), to=Status.QUEUED, message=message)
        # after the change: what is held is at least queued, or was
        with self._lock:
            self._prepared[job.id] = Prepared(training.examples, () if validation is None else validation.examples)

    def _read(self, job: Job, file_id: str, param: str) -> Dataset | None:
        """A file of a job; None if it cannot be read, which is the job's end."""
        try:
            path = self._uploads.path(file_id)
            dataset = read_dataset(path, self._tokenizer, job.hyperparameters, self._context, self._vocab_size)
        except Exception as error:
            self._repository.fail(job.id, error, param=param)
            return None
        if job.status == Status.VALIDATING and dataset.num_truncated:
            what = "examples" if param == "training_file" else "validation examples"
            self._repository.tell(job.id, f"{dataset.num_truncated} {what} were cut to the allowed length", "warn")
        return dataset

"""Reads the examples of jobs, in a thread of its own: tokenizing a large file takes a while.

Examples are kept in memory until training takes them. After a restart or a pause they are read again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from flextron.files import NoSpaceError
from flextron.jobs.dataset import read_dataset
from flextron.jobs.journal import Journal
from flextron.jobs.records import ALIVE, Job, Status
from flextron.jobs.trainer import Example
from flextron.jobs.uploads import Uploads

__all__ = ["Preparer"]

_log = logging.getLogger("flextron.server")
_REST_SECONDS = 1.0
"""Until the disk may have room again."""


class Preparer:
    """Jobs in, examples out; callable from any thread."""

    def __init__(
        self,
        journal: Journal,
        uploads: Uploads,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        on_change: Callable[[], None],
    ) -> None:
        """Take what reading needs.

        Args:
            journal: told how it went.
            uploads: where the files are.
            tokenizer: used by nobody else.
            context: positions of the model.
            on_change: called, by the thread that reads, when a job is ready or has failed.
        """
        self._journal, self._uploads, self._tokenizer, self._context = journal, uploads, tokenizer, context
        self._on_change = on_change
        self._examples: dict[str, Sequence[Example]] = {}
        self._lock, self._is_ending = threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(1, "flextron-datasets")

    def submit(self, job_id: str) -> None:
        """Read a job's examples soon."""
        self._pool.submit(self._run, job_id)

    def take(self, job_id: str) -> Sequence[Example] | None:
        """A job's examples, once; None if they are not there."""
        with self._lock:
            return self._examples.pop(job_id, None)

    def held(self) -> dict[str, Sequence[Example]]:
        """What waits to be taken."""
        with self._lock:
            return dict(self._examples)

    def drop(self, held: dict[str, Sequence[Example]], *, but: Container[str]) -> None:
        """Let go of what `held` returned, unless the job is one of these or its examples were read again since."""
        with self._lock:
            for job_id, examples in held.items():
                if job_id not in but and self._examples.get(job_id) is examples:
                    del self._examples[job_id]

    def close(self) -> None:
        """End after the file that is being read."""
        self._is_ending.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job_id: str) -> None:
        while not self._is_ending.is_set():
            job = self._journal.get(job_id)
            if job.status not in ALIVE:
                return
            try:
                self._prepare(job)
                self._on_change()
                return
            except NoSpaceError:
                _log.exception("job %s waits for room on the disk", job_id)
                time.sleep(_REST_SECONDS)

    def _prepare(self, job: Job) -> None:
        try:
            path = self._uploads.path(job.training_file)
            dataset = read_dataset(path, self._tokenizer, job.hyperparameters, self._context)
        except Exception as error:
            self._journal.fail(job.id, error, param="training_file")
            return
        if job.status == Status.VALIDATING and dataset.num_truncated:
            self._journal.tell(job.id, f"{dataset.num_truncated} examples were cut to the allowed length", "warn")
        message = f"the file holds {len(dataset.examples)} examples; the job waits for its turn"
        self._journal.change(job.id, before=(Status.VALIDATING,), to=Status.QUEUED, message=message)
        # after the change: what is held is at least queued, or was
        with self._lock:
            self._examples[job.id] = dataset.examples

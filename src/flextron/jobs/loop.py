"""A thread that trains whenever there is something to train, for a machine that does nothing else."""

from __future__ import annotations

import logging
import threading

from flextron.jobs.jobs import Jobs

__all__ = ["TrainingLoop"]

_log = logging.getLogger("flextron.server")
_REST_SECONDS = 0.5


class TrainingLoop(threading.Thread):
    """Calls `Jobs.step` until it is stopped."""

    def __init__(self, jobs: Jobs) -> None:
        """Take the jobs."""
        super().__init__(name="flextron-training", daemon=True)
        self._jobs, self._is_ending = jobs, threading.Event()

    def run(self) -> None:
        """Train."""
        while not self._is_ending.is_set():
            try:
                if not self._jobs.step():
                    self._jobs.wait(_REST_SECONDS)
            except Exception:
                # of the database, as no job's own error comes here: it may be well again later
                _log.exception("training rests")
                self._is_ending.wait(_REST_SECONDS)

    def stop(self) -> None:
        """End the thread after the step that runs."""
        self._is_ending.set()
        self.join()

"""The state directory: who may use it, and what lies where."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from flextron.errors import FlextronError
from flextron.files import lock_directory

__all__ = ["StateDirectory"]


class StateDirectory:
    """The directory of jobs and files; it belongs to one process at a time."""

    def __init__(self, path: Path) -> None:
        """Take the directory, and remove what a killed process left half written.

        Raises:
            FlextronError: another process has it, or it cannot be written.
        """
        self.path = path
        self.files, self.jobs, self.attempts = path / "files", path / "jobs", path / "attempts"
        try:
            for directory in (path, self.files, self.jobs, self.attempts):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlextronError(
                f"the state directory {path} cannot be used ({error.strerror}); choose another"
            ) from error
        self._lock = ExitStack()
        self._lock.enter_context(lock_directory(path))
        self._remove_leftovers()

    @property
    def database(self) -> Path:
        """Path of the SQLite database."""
        return self.path / "state.sqlite"

    def file(self, file_id: str) -> Path:
        """Path of a file's content; the id must come from the database, never from a client."""
        return self.files / file_id

    def state(self, job_id: str) -> Path:
        """Directory of the trainer's state of an unfinished job."""
        return self.jobs / job_id / "state"

    def adapter(self, job_id: str, step: int) -> Path:
        """Directory of the adapter after a step."""
        return self.jobs / job_id / f"step-{step}"

    def remove_state(self, job_id: str) -> None:
        """A job goes on no more."""
        shutil.rmtree(self.state(job_id), ignore_errors=True)

    def remove_adapter(self, job_id: str, step: int) -> None:
        """Nobody will ask for it any more."""
        shutil.rmtree(self.adapter(job_id, step), ignore_errors=True)

    def remove_states(self, *, but: Collection[str]) -> None:
        """Remove the states of all jobs but these."""
        for path in self.jobs.iterdir():
            if path.name not in but:
                self.remove_state(path.name)

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    def _remove_leftovers(self) -> None:
        # `new_file` and `new_directory` write hidden neighbours
        for directory in (self.files, self.jobs, self.attempts, *(p for p in self.jobs.iterdir() if p.is_dir())):
            for left in directory.glob(".*"):
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()

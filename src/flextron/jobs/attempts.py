"""Which work this process is in the middle of, so that the next process knows what killed it.

Some work can end a process without a word: memory that is not there, a library that aborts. After one such death a job
is begun again, because the process may have been killed from outside; after two at the same work it has failed. A file
lies there while the work goes on. It has to survive the process, not the machine, so nothing waits for the disk.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from flextron.errors import FlextronError
from flextron.files import NoSpaceError, new_file

__all__ = ["Attempts", "Work"]

_MOST_DEATHS = 2

Work = Literal["reading", "making", "stepping"]
"""Its files, its trainer, and the first step since the process began."""


class Attempts:
    """One directory, with a file for what is being done, or was when a process died; callable from any thread."""

    def __init__(self, directory: Path, alive: Container[str]) -> None:
        """Take the directory.

        Args:
            directory: there already.
            alive: ids of the jobs that may be begun; of others nothing is remembered.
        """
        self._directory = directory
        self._deaths: dict[str, int] = {}
        for path in directory.iterdir():
            if path.stem not in alive:
                path.unlink()
                continue
            begun = path.read_text()
            # an empty one was being written
            self._deaths[path.name] = int(begun) if begun.isdecimal() else 1

    @contextmanager
    def at_work(self, job_id: str, work: Work) -> Iterator[None]:
        """The block may end the process; errors as for `begin`."""
        self.begin(job_id, work)
        try:
            yield
        finally:
            self.end(job_id, work)

    def begin(self, job_id: str, work: Work) -> None:
        """What follows may end the process.

        Raises:
            FlextronError: it did so too often.
        """
        name = f"{job_id}.{work}"
        num_deaths = self._deaths.get(name, 0)
        if num_deaths >= _MOST_DEATHS:
            raise FlextronError(
                f"the server died {num_deaths} times while it was {_TOLD[work]}, so it is not tried again; "
                "give it smaller examples, or a smaller batch_size or rank"
            )
        # without room on the disk a death goes unnoticed
        with suppress(NoSpaceError), new_file(self._directory / name) as temporary:
            temporary.write_text(str(num_deaths + 1))

    def end(self, job_id: str, work: Work) -> None:
        """It did not."""
        name = f"{job_id}.{work}"
        self._deaths.pop(name, None)
        (self._directory / name).unlink(missing_ok=True)


_TOLD: dict[Work, str] = {
    "reading": "reading this job's files",
    "making": "making ready to train this job",
    "stepping": "taking this job's first step since its start",
}

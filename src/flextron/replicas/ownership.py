"""Finetuning with several replicas: one of them owns the state directory, and all see the adapters in it.

The owner is the replica that holds the directory's lock. When it dies, the lock is free, and the next owner goes on
with all jobs from their saved states. The owner writes which adapters there are into one file, which all read when they
are asked; SQLite, which must not be opened from several hosts, is the owner's alone.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pydantic import BaseModel

from flextron.api import ElasticModel
from flextron.files import DirectoryInUseError, checked, lock_directory, read_json, write_json
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import JobCheckpoint
from flextron.replicas.plan import Plan
from flextron.server.startup import open_jobs
from flextron.serving.adapters import FINETUNED, AdapterNames, NamedAdapter

__all__ = ["SharedAdapters", "own"]

_FILE = "adapters.json"


class _Entry(BaseModel):
    created_at: int
    directory: str
    """Relative to the state directory."""


class SharedAdapters(AdapterNames):
    """The operator's adapters, and those that the owner of the state directory has made; callable from any thread."""

    def __init__(self, directory: Path | None) -> None:
        """Take the state directory, which need not exist yet; None for none."""
        super().__init__()
        self._directory = directory

    def get(self, name: str) -> NamedAdapter | None:
        """The adapter with this name, or None."""
        if name.startswith(FINETUNED):
            self._read()
        return super().get(name)

    def all(self) -> list[NamedAdapter]:
        """All adapters, the operator's first."""
        self._read()
        return super().all()

    def _read(self) -> None:
        """Know those in the file; an adapter that stays is the same object."""
        if self._directory is None or not (path := self._directory / _FILE).exists():
            return
        found = checked(dict[str, _Entry], read_json(path), str(path), "delete the file and start the replicas again")
        with self._lock:
            for name in [name for name in self._named if name.startswith(FINETUNED) and name not in found]:
                del self._named[name]
            for name, entry in found.items():
                old, directory = self._named.get(name), self._directory / entry.directory
                if old is None or (old.directory, old.created_at) != (directory, entry.created_at):
                    self._named[name] = NamedAdapter(name, directory, entry.created_at)


class _Made(AdapterNames):
    """What the owner's jobs made; each change goes into the file, once all that was there is known."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory, self._writing, self._is_complete = directory, threading.Lock(), False

    def add_checkpoint(self, checkpoint: JobCheckpoint, directory: Path) -> None:
        super().add_checkpoint(checkpoint, directory)
        self._write()

    def remove_checkpoint(self, checkpoint: JobCheckpoint) -> None:
        super().remove_checkpoint(checkpoint)
        self._write()

    def complete(self) -> None:
        self._is_complete = True
        self._write()

    def _write(self) -> None:
        if self._is_complete:
            with self._writing:
                made = {
                    named.name: _Entry(
                        created_at=named.created_at, directory=str(named.directory.relative_to(self._directory))
                    ).model_dump()
                    for named in self.all()
                }
                write_json(self._directory / _FILE, made)


def own(plan: Plan, model: ElasticModel) -> Jobs | None:
    """The jobs, if no other replica has them.

    Raises:
        FlextronError: the directory cannot be used, or is of another model or other weights.
    """
    assert plan.state_directory is not None
    directory = Path(plan.state_directory).expanduser()
    made = _Made(directory)
    try:
        if directory.is_dir():
            # before the weights are hashed
            with lock_directory(directory):
                pass
        jobs = open_jobs(model, directory, made, name=plan.server.name, source=plan.directory, settings=plan.jobs)
    except DirectoryInUseError:
        return None
    made.complete()
    return jobs

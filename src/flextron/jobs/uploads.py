"""Files of clients, and those that jobs make for them."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

from flextron.errors import FlextronError
from flextron.files import new_file, sync
from flextron.jobs.database import Store
from flextron.jobs.directory import StateDirectory
from flextron.jobs.records import ENDED, File, new_id

__all__ = ["FINE_TUNE", "RESULTS", "Uploads", "insert_file"]

FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"
_MOST_LETTERS = 255


class Uploads:
    """Content lies under the file's id; what clients call it is in the database alone."""

    def __init__(self, directory: StateDirectory, store: Store) -> None:
        """Remove contents that a killed process had not entered into the database, or had just taken out of it."""
        self._directory, self._store = directory, store
        known = {row["id"] for row in store.rows("SELECT id FROM files")}
        for path in directory.files.iterdir():
            if path.name not in known:
                path.unlink()

    @property
    def spool(self) -> Path:
        """A directory on the same disk, for what is still arriving."""
        return self._directory.path

    def add(self, filename: str, purpose: str, content: Iterable[bytes]) -> File:
        """Keep a file; it is on the disk when this returns.

        Args:
            filename: the client's name for it; a path is cut to its last part.
            purpose: `fine-tune` for training and validation.
            content: pieces of it.

        Raises:
            NoSpaceError: the disk is full.
        """
        file = self.write(filename, purpose, content)
        try:
            with self._store.transaction() as database:
                insert_file(database, file)
        except BaseException:
            self._directory.file(file.id).unlink()
            raise
        return file

    def write(self, filename: str, purpose: str, content: Iterable[bytes]) -> File:
        """Put a file on the disk without entering it into the database, where `insert_file` puts it."""
        file_id, num_bytes = new_id("file"), 0
        path = self._directory.file(file_id)
        with new_file(path) as temporary:
            with temporary.open("wb") as out:
                for piece in content:
                    num_bytes += out.write(piece)
            sync(temporary)
        sync(path.parent)
        return File(
            id=file_id, created_at=int(time.time()), bytes=num_bytes, filename=_last_part(filename), purpose=purpose
        )

    def get(self, file_id: str) -> File:
        """A file.

        Raises:
            UnknownIdError: there is none.
        """
        return File.of(self._store.row("files", file_id))

    def path(self, file_id: str) -> Path:
        """Path of a file's content.

        Raises:
            UnknownIdError: there is none.
        """
        return self._directory.file(self.get(file_id).id)

    def page(self, *, purpose: str | None, after: str | None, limit: int, is_rising: bool) -> tuple[list[File], bool]:
        """A page of files, and whether more follow.

        Raises:
            UnknownIdError: there is no file `after`.
        """
        where = {} if purpose is None else {"purpose": purpose}
        rows, has_more = self._store.page("files", where=where, after=after, limit=limit, is_rising=is_rising)
        return [File.of(row) for row in rows], has_more

    def delete(self, file_id: str) -> None:
        """Remove a file.

        Raises:
            UnknownIdError: there is none.
            FlextronError: an unfinished job needs it.
        """
        file = self.get(file_id)
        marks = ", ".join("?" * len(ENDED))
        query = f"SELECT id FROM jobs WHERE ? IN (training_file, validation_file) AND status NOT IN ({marks})"
        with self._store.transaction() as database:
            using = database.execute(query, (file.id, *ENDED)).fetchone()
            if using is not None:
                raise FlextronError(f"the job {using['id']} needs this file; cancel it first")
            database.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self._directory.file(file.id).unlink(missing_ok=True)


def insert_file(database: sqlite3.Connection, file: File) -> None:
    """Enter a file within a transaction."""
    database.execute(
        "INSERT INTO files (id, created_at, bytes, filename, purpose) VALUES (?, ?, ?, ?, ?)",
        (file.id, file.created_at, file.bytes, file.filename, file.purpose),
    )


def _last_part(filename: str) -> str:
    """A name that is safe to show and to save under: no path, nothing unprintable."""
    name = "".join(c for c in os.path.basename(filename.replace("\\", "/")) if c.isprintable())
    return name[:_MOST_LETTERS] if name.strip(". ") else "file"

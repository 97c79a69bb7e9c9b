"""The database: its tables, transactions, and pages of rows.

SQLite in WAL mode with full synchronization: what a transaction wrote is there after `kill -9` and after a power cut.
One connection serves all threads, one at a time; no transaction takes longer than some milliseconds.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flextron.errors import FlextronError
from flextron.files import NoSpaceError

__all__ = ["Store", "UnknownIdError"]

_VERSION = 4
_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL,
    bytes INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL
);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, finished_at INTEGER,
    status TEXT NOT NULL, model TEXT NOT NULL, suffix TEXT, fine_tuned_model TEXT, training_file TEXT NOT NULL,
    validation_file TEXT, hyperparameters TEXT NOT NULL, seed INTEGER NOT NULL, metadata TEXT NOT NULL, error TEXT,
    result_file TEXT, is_deleted INTEGER NOT NULL DEFAULT 0, spec TEXT
);
CREATE UNIQUE INDEX one_suffix ON jobs (model, suffix)
    WHERE suffix IS NOT NULL AND status NOT IN ('failed', 'cancelled') AND NOT is_deleted;
CREATE TABLE steps (
    job_id TEXT NOT NULL, step INTEGER NOT NULL, loss REAL NOT NULL, accuracy REAL, num_tokens INTEGER NOT NULL,
    valid_loss REAL, valid_accuracy REAL,
    PRIMARY KEY (job_id, step)
);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL, created_at INTEGER NOT NULL,
    level TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL
);
CREATE INDEX events_of_job ON events (job_id, seq);
CREATE TABLE checkpoints (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL, created_at INTEGER NOT NULL,
    step INTEGER NOT NULL, name TEXT NOT NULL, loss REAL NOT NULL, accuracy REAL, is_deleted INTEGER NOT NULL DEFAULT 0,
    valid_loss REAL, valid_accuracy REAL,
    UNIQUE (job_id, step)
);
CREATE TABLE weights (fingerprint TEXT NOT NULL);
"""
_FROM_2 = """
ALTER TABLE jobs ADD COLUMN validation_file TEXT;
ALTER TABLE jobs ADD COLUMN is_deleted INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET is_deleted = 1 WHERE fine_tuned_model IN (SELECT name FROM checkpoints WHERE is_deleted);
DROP INDEX one_suffix;
CREATE UNIQUE INDEX one_suffix ON jobs (model, suffix)
    WHERE suffix IS NOT NULL AND status NOT IN ('failed', 'cancelled') AND NOT is_deleted;
CREATE TABLE weights (fingerprint TEXT NOT NULL);
ALTER TABLE steps ADD COLUMN valid_loss REAL;
ALTER TABLE steps ADD COLUMN valid_accuracy REAL;
ALTER TABLE checkpoints ADD COLUMN valid_loss REAL;
ALTER TABLE checkpoints ADD COLUMN valid_accuracy REAL;
"""
_FROM_3 = """
ALTER TABLE jobs ADD COLUMN spec TEXT;
"""
_CHANGES = {0: _SCHEMA, 2: _FROM_2 + _FROM_3, 3: _FROM_3}
"""What brings a database of an older format, or an empty one, to this one."""


class UnknownIdError(FlextronError):
    """No row has this id."""


class Store:
    """One open database."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it.

        Raises:
            FlextronError: it is damaged, or of another version of this program.
        """
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            (found,) = self._connection.execute("PRAGMA user_version").fetchone()
            if found in _CHANGES:
                with self.transaction():
                    for statement in _CHANGES[found].split(";\n"):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {_VERSION}")
            elif found != _VERSION:
                raise FlextronError(
                    f"{path} is of format {found}, and this version of flextron reads {_VERSION}; use another directory"
                )
        except sqlite3.DatabaseError as error:
            raise FlextronError(f"{path} cannot be used ({error}); restore it or use another directory") from error

    def close(self) -> None:
        """Write the log into the database and close it."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that the block writes, or nothing; on disk when the block has ended.

        Raises:
            NoSpaceError: the disk is full; nothing was written.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                # a full disk may have rolled back already
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error):
                    raise NoSpaceError("no space is left for the database of jobs; free some") from error
                raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def row(self, table: str, row_id: str) -> sqlite3.Row:
        """The row with this id.

        Raises:
            UnknownIdError: there is none.
        """
        found = self.rows(f"SELECT * FROM {table} WHERE id = ?", row_id)
        if not found:
            raise UnknownIdError(f"there is no {row_id[:100]!r}")
        return found[0]

    def page(
        self,
        table: str,
        *,
        where: dict[str, Any],
        after: str | None,
        limit: int,
        is_rising: bool = False,
    ) -> tuple[list[sqlite3.Row], bool]:
        """Some rows, and whether more follow.

        Args:
            table: its name.
            where: columns and the values that they must have.
            after: id of the last row of the page before; None for the first page.
            limit: most rows.
            is_rising: oldest first.

        Raises:
            UnknownIdError: there is no row `after`.
        """
        conditions, values = [f"{column} = ?" for column in where], list(where.values())
        if after is not None:
            conditions.append(f"seq {'>' if is_rising else '<'} ?")
            values.append(self.row(table, after)["seq"])
        filtered = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        order = f"ORDER BY seq {'ASC' if is_rising else 'DESC'} LIMIT ?"
        rows = self.rows(f"SELECT * FROM {table} {filtered}{order}", *values, limit + 1)
        return rows[:limit], len(rows) > limit

"""Files that others may have written, read with bounds; and writing that leaves either the old state or the new one.

Notable: what a JSON file holds is checked against a typed model before anything is built from it (`checked`), and
files are written with the modes that the process's umask gives, whichever library writes them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flextron.errors import FlextronError

__all__ = [
    "DirectoryInUseError",
    "NoSpaceError",
    "checked",
    "durable_directory",
    "lock_directory",
    "naming_a_full_disk",
    "new_directory",
    "new_file",
    "read_json",
    "read_text",
    "sync",
    "write_json",
]

T = TypeVar("T")

_FULL_DISK = re.compile(r"No space left on device|^\d+ requested and \d+ written$")
"""What safetensors and NumPy say of it, without an error number."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LARGEST_JSON = 64 * 1024**2
"""Bytes; parsed, they can take ten times as many."""


class NoSpaceError(FlextronError):
    """The disk is full."""


class DirectoryInUseError(FlextronError):
    """Another process has the directory."""


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Whichever library meets a full disk, say so in the user's terms.

    Raises:
        NoSpaceError: the block met one.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and not _FULL_DISK.search(str(error)):
            raise
        raise NoSpaceError(f"no space is left to write {path}; free some, then run the same command again") from error


@contextmanager
def new_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary neighbour that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        FlextronError: `path` is a directory, or exists and is not to be overwritten, or the disk is full
            (`NoSpaceError`).
    """
    if path.is_dir():
        raise FlextronError(f"{path} is a directory; give the name of a file")
    if path.exists() and not overwrite:
        raise FlextronError(f"{path} exists already; choose another file or pass overwrite (--overwrite)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_a_full_disk(path):
            yield temporary
            _set_usual_mode(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _set_usual_mode(path: Path) -> None:
    """Give a file the mode that `open` would have: safetensors and `tempfile` keep theirs from everybody else."""
    probe = path.with_name(f".{secrets.token_hex(8)}.mode")
    try:
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            path.chmod(stat.S_IMODE(os.fstat(handle).st_mode))
        finally:
            os.close(handle)
    finally:
        probe.unlink(missing_ok=True)


def _neighbour(path: Path, what: str) -> Path:
    """A new directory beside another, with the mode that the umask gives."""
    made = path.with_name(f".{path.name}-{what}{secrets.token_hex(6)}")
    made.mkdir()
    return made


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        FlextronError: `path` exists and is not to be overwritten, or the disk is full (`NoSpaceError`).
    """
    if path.exists() and not overwrite:
        raise FlextronError(f"{path} exists already; choose another directory or pass overwrite (--overwrite)")
    with naming_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _neighbour(path, "")
    try:
        with naming_a_full_disk(path):
            yield temporary
            for written in temporary.rglob("*"):
                if written.is_file() and not written.is_symlink():
                    _set_usual_mode(written)
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
                _swap(path, temporary)
            else:
                os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two directories in one step, where the system can (Linux's renameat2); whether it did."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return int(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)) == 0


def _swap(path: Path, new: Path) -> None:
    """Put `new` in the place of the directory `path`; if that fails, `path` is as it was."""
    if _exchange(path, new):
        return
    retired = _neighbour(path, "old-")
    os.replace(path, retired / path.name)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(retired / path.name, path)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one move.

    Raises:
        NoSpaceError: the disk is full.
    """
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_text(path: Path, largest: int = _LARGEST_JSON) -> str:
    """Read a regular file of UTF-8; a pipe or a device would never end.

    Raises:
        FlextronError: the file is missing, no regular file, larger than `largest` bytes, or no UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FlextronError(f"{path} is not a regular file; put the file itself there")
        if found.st_size > largest:
            raise FlextronError(f"{path} has {found.st_size} bytes, more than the {largest} that such a file may have")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FlextronError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise FlextronError(f"{path} is not UTF-8 ({error.reason}); restore it or make it again") from error
    except OSError as error:
        raise FlextronError(f"{path} cannot be read ({error.strerror}); check that you may read it") from error


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FlextronError: the file is missing, malformed, or larger or deeper than any that is meant.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError: syntax, and integers of thousands of digits
        raise FlextronError(f"{path} is not valid JSON ({error}); restore it or make it again") from error


def checked(kind: type[T], data: Any, what: str, remedy: str) -> T:
    """Data of a file, checked against its typed model (a pydantic model or any annotated type).

    Args:
        kind: the model.
        data: parsed JSON.
        what: what the data is of, for the message.
        remedy: what to do if it does not fit.

    Raises:
        FlextronError: it does not fit; names the first entry at fault, and never quotes it at length.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
        # ascii: names in the file may be no text that a terminal takes
        said = said.encode("ascii", "backslashreplace").decode()
        raise FlextronError(f"{what} is malformed ({said}); {remedy}") from error


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Keep other processes out of a directory.

    Raises:
        FlextronError: another process has it (`DirectoryInUseError`), or it cannot be written.
    """
    try:
        # not inherited: a child must not keep the directory when this process has ended
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FlextronError(f"the directory {path} cannot be used ({error.strerror}); choose another") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DirectoryInUseError(
                f"the directory {path} is in use by another process; give each one of its own"
            ) from error
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def durable_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path`, whole, when the block ends well, and is then on the disk.

    Raises:
        FlextronError: the disk is full; what was at `path` before is still there.
    """
    with new_directory(path, overwrite=True) as temporary:
        yield temporary
        for written in temporary.rglob("*"):
            sync(written)
        sync(temporary)
    sync(path.parent)

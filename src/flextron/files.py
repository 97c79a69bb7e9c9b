"""Writing that leaves either the old state or the new one on disk, whatever happens in between."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flextron.errors import FlextronError

__all__ = ["NoSpaceError", "naming_a_full_disk", "new_directory", "new_file", "read_json", "write_json"]

_FULL_DISK = re.compile(r"No space left on device|^\d+ requested and \d+ written$")
"""What safetensors and NumPy say of it, without an error number."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class NoSpaceError(FlextronError):
    """The disk is full."""


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
def new_file(path: Path) -> Iterator[Path]:
    """A temporary neighbour that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        NoSpaceError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_a_full_disk(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    temporary.chmod(0o755)
    try:
        with naming_a_full_disk(path):
            yield temporary
            if path.exists():
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
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
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


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FlextronError: the file is missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FlextronError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlextronError(f"{path} is not valid JSON ({error}); restore it or make it again") from error

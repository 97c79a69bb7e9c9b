"""C++ sources of this package: built once for this processor with the machine's own compiler, then kept.

A library's file name holds two digests: of what it was built from, and of its own bytes. So one rename puts it there
whole, and a file that was cut short later is not loaded (the kernel would end the process with a bus error) but built
again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from flextron.kernels.layout import Source, check_layout

__all__ = ["library_of", "load_library"]

_COMPILE = ("-std=c++17", "-O3", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# without -ffast-math: linked with it, a library turns denormal numbers off for the whole process
_LINK = ("-fopenmp", "-shared")
_LONGEST_SECONDS = 900

_SOURCES = Path(__file__).with_name("csrc")

_log = logging.getLogger("flextron.kernels")  # warnings reach stderr where nobody has set up logging
_said: set[str] = set()


class _NoLibraryError(Exception):
    """Why there are no kernels, in one sentence."""


@cache
def load_library(name: Source) -> ctypes.CDLL | str:
    """The compiled kernels of a source, or in one sentence why there are none.

    What the user did not ask for is said on stderr, once a process: a missing or failing compiler, and a first build.

    Raises:
        FlextronError: the library's structs are not laid out as Python's.
    """
    if os.environ.get("FLEXTRON_NATIVE") == "0":
        return "FLEXTRON_NATIVE is 0"
    try:
        library = ctypes.CDLL(str(_library(name, _compiler())))
        check_layout(name, library)
        return library
    except _NoLibraryError as error:
        reason = str(error)
    except OSError as error:
        reason = f"the compiled kernels did not load ({error})"
    _say_once("missing", f"decoding and finetuning run without compiled kernels, which is slower: {reason}")
    return reason


def library_of(name: Source) -> ctypes.CDLL:
    """The compiled kernels of a source that is known to have them."""
    library = load_library(name)
    assert not isinstance(library, str)
    return library


def _say_once(kind: str, text: str) -> None:
    if kind not in _said:
        _said.add(kind)
        _log.warning("note: %s", text)


def _compiler() -> list[str]:
    """The command, which may have several words, as in `ccache g++`."""
    given = shlex.split(os.environ.get("CXX", ""))
    command = given or [found for found in map(shutil.which, ("c++", "g++", "clang++")) if found][:1]
    if not command:
        raise _NoLibraryError("no C++ compiler was found; install g++")
    if shutil.which(command[0]) is None:
        raise _NoLibraryError(f"the C++ compiler that CXX names, {command[0]}, does not exist")
    return command


def _flags() -> tuple[str, ...]:
    """Flags of the compiler; `FLEXTRON_MARCH` names another processor, such as x86-64-v3 for plain AVX2."""
    return (f"-march={os.environ.get('FLEXTRON_MARCH') or 'native'}", *_COMPILE)


def _cache_directory() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache"))
    if not base.is_absolute():
        raise _NoLibraryError("there is no home directory to keep them in; set XDG_CACHE_HOME to a directory")
    return base / "flextron"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _origin(source: Path, compiler: list[str]) -> str:
    """A digest of all that a library is built from and for."""
    facts = [*compiler, *_flags(), *_LINK, platform.machine()]
    facts += [path.read_text(encoding="utf-8") for path in (source, *sorted(_SOURCES.glob("*.h")))]
    processor = Path("/proc/cpuinfo")
    if processor.exists():  # the code is made for this processor; a shared home directory serves several
        lines = processor.read_text(encoding="utf-8", errors="replace").splitlines()
        facts += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return _digest("\0".join(facts).encode())


def _library(name: Source, compiler: list[str]) -> Path:
    """Path of the complete library, which is built if need be."""
    source, directory = _SOURCES / f"{name}.cpp", _cache_directory()
    stem = f"{name}-{_origin(source, compiler)}"
    if (found := _kept(directory, stem)) is not None:
        return found
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _say_once(
            "building", "kernels are being compiled for this processor; that is done once, in about half a minute"
        )
        with _alone(directory):
            if (found := _kept(directory, stem)) is not None:  # another process has built it meanwhile
                return found
            return _build(source, compiler, directory, stem)
    except OSError as error:
        raise _NoLibraryError(
            f"the directory {directory} cannot be used ({error.strerror or error}); set XDG_CACHE_HOME to another"
        ) from error


def _kept(directory: Path, stem: str) -> Path | None:
    """A library of that origin whose bytes are those that were written."""
    whole = (p for p in directory.glob(f"{stem}-*.so") if p.stem == f"{stem}-{_digest(p.read_bytes())}")
    return next(whole, None)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time builds; what others left when they were killed goes."""
    handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in directory.glob("tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _build(source: Path, compiler: list[str], directory: Path, stem: str) -> Path:
    for damaged in directory.glob(f"{stem}-*.so"):
        damaged.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        made = Path(temporary, "made.so")
        for command in ((*_flags(), str(source), "-o", f"{made}.o"), (*_LINK, f"{made}.o", "-o", str(made))):
            _run([*compiler, *command])
        data = made.read_bytes()
        library = directory / f"{stem}-{_digest(data)}.so"
        _sync(made)
        made.replace(library)
    _sync(directory)
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LONGEST_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NoLibraryError(f"the C++ compiler {command[0]} did not run to its end ({error})") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it gave no reason")
        raise _NoLibraryError(f"the C++ compiler {command[0]} failed ({said.strip()})")


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""C++ sources of this package: built once for this processor with the machine's own compiler, then kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["Source", "load_library"]

_COMPILE = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# without -ffast-math: linked with it, a library turns denormal numbers off for the whole process
_LINK = ("-fopenmp", "-shared")

_SOURCES = Path(__file__).with_name("kernels")
Source = Literal["step", "window"]
"""Decoding's iteration; kernels of training windows."""


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flextron"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@cache
def load_library(name: Source) -> ctypes.CDLL | str:
    """The compiled kernels of a source, or in one sentence why there are none."""
    if os.environ.get("FLEXTRON_NATIVE") == "0":
        return "FLEXTRON_NATIVE is 0"
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler was found (install g++ for faster decoding and finetuning)"
    source = _SOURCES / f"{name}.cpp"
    processor = Path("/proc/cpuinfo")
    facts = [compiler, *_COMPILE, *_LINK, platform.machine()]
    facts += [path.read_text(encoding="utf-8") for path in (source, *sorted(_SOURCES.glob("*.h")))]
    if processor.exists():  # the code is made for this processor; a shared home directory serves several
        facts += [
            line
            for line in processor.read_text(encoding="utf-8").splitlines()
            if line.startswith(("flags", "Features"))
        ][:1]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    library = _cache_directory() / f"{name}-{digest}.so"
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                made = Path(directory) / library.name
                for command in ((*_COMPILE, str(source), "-o", f"{made}.o"), (*_LINK, f"{made}.o", "-o", str(made))):
                    subprocess.run([compiler, *command], check=True, capture_output=True)
                made.replace(library)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            return f"the kernels did not compile ({said.decode(errors='replace').strip().splitlines()[-1]})"
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        return f"the compiled kernels did not load ({error})"

"""Building and keeping compiled kernels: what is damaged, left over, missing or failing, and what is said of it."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flextron.kernels import build as compiled
from flextron.kernels.build import load_library
from flextron.kernels.layout import Source, expected_layout

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and a source that compiles at once; nothing was said yet."""
    sources = tmp_path / "kernels"
    sources.mkdir()
    answers: tuple[tuple[Source, int], ...] = (("decoder", 41), ("training", 42))
    for name, answer in answers:
        layout = "\\n".join(expected_layout(name))
        text = f'int answer() {{ return {answer}; }} const char* flextron_layout() {{ return "{layout}"; }}'
        (sources / f"{name}.cpp").write_text(f'extern "C" {{ {text} }}')
    monkeypatch.setattr(compiled, "_SOURCES", sources)
    monkeypatch.setattr(compiled, "_said", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "FLEXTRON_NATIVE", "FLEXTRON_MARCH"):
        monkeypatch.delenv(name, raising=False)
    load_library.cache_clear()
    yield tmp_path / "cache" / "flextron"
    load_library.cache_clear()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def answer(name: Source) -> int:
    load_library.cache_clear()
    library = load_library(name)
    assert isinstance(library, ctypes.CDLL), library
    return int(library.answer())


def kept(cache: Path) -> list[Path]:
    return sorted(p for p in cache.iterdir() if p.name != "lock")


@needs_compiler
def test_a_library_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("decoder") == 41
    assert answer("training") == 42
    libraries = kept(cache)
    assert len(libraries) == 2
    times = [p.stat().st_mtime_ns for p in libraries]
    monkeypatch.setattr(compiled, "_build", None)
    assert answer("decoder") == 41
    assert [p.stat().st_mtime_ns for p in kept(cache)] == times


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:200] + bytes(len(whole) - 200),
        lambda whole: whole[:-1],
    ],
    ids=["empty", "zeros", "one byte short"],
)
def test_a_damaged_library_is_built_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    assert answer("decoder") == 41
    (library,) = kept(cache)
    whole = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(damage(whole))
    # in a process of its own: a damaged library that is mapped ends the process
    code = "from flextron.kernels import build; from pathlib import Path; import sys\n"
    code += "build._SOURCES = Path(sys.argv[1]); print(build.load_library('decoder').answer())"
    command = [sys.executable, "-c", code, str(compiled._SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert (done.returncode, done.stdout) == (0, "41\n"), done.stderr
    assert [p.read_bytes() for p in kept(cache)] == [whole]


@needs_compiler
def test_what_a_killed_build_leaves_is_cleaned(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    slow = script(tmp_path / "slow", f"touch {started}; sleep 60")
    code = "from flextron.kernels.build import load_library; load_library('decoder')"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CXX": str(slow)}, stderr=-3)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(p.is_dir() for p in kept(cache))
    assert answer("decoder") == 41
    assert [p.suffix for p in kept(cache)] == [".so"]


@needs_compiler
def test_the_target_is_part_of_the_name_and_of_the_command(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    wrapper = script(tmp_path / "wrapper", f'echo "$@" >> {log}\nshift\nexec "$@"')
    monkeypatch.setenv("CXX", f"{wrapper} word c++")
    assert answer("decoder") == 41
    assert "-march=native" in log.read_text()
    monkeypatch.setenv("FLEXTRON_MARCH", "no-such-processor")
    load_library.cache_clear()
    assert "no-such-processor" in str(load_library("decoder"))
    assert "-march=no-such-processor" in log.read_text()


def test_without_kernels_the_reason_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = script(tmp_path / "failing", "echo 'warning: x' >&2; echo 'omp.h: fatal error: missing' >&2; exit 1")
    dumb = script(tmp_path / "dumb", "exit 3")
    wordless = script(tmp_path / "wordless", "echo >&2; exit 1")
    for path, said in (
        ("no-such-compiler", "names, no-such-compiler, does not exist"),
        (str(failing), "omp.h: fatal error: missing"),
        (str(dumb), "no reason"),
        (str(wordless), "no reason"),
    ):
        monkeypatch.setenv("CXX", path)
        caplog.clear()
        compiled._said.clear()
        load_library.cache_clear()
        for name in ("decoder", "training", "decoder"):
            reason = load_library(name)  # type: ignore[arg-type]
            assert isinstance(reason, str)
            assert said in reason
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len([text for text in texts if said in text]) == 1
        assert all("\n" not in text for text in texts)
        assert len(texts) == 1 + (path != "no-such-compiler")  # and that a build began
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    load_library.cache_clear()
    assert "install g++" in str(load_library("decoder"))


def test_kernels_that_are_not_wanted_are_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLEXTRON_NATIVE", "0")
    assert load_library("decoder") == "FLEXTRON_NATIVE is 0"
    assert not caplog.records


@needs_compiler
def test_it_is_said_on_stderr_without_any_set_up(tmp_path: Path) -> None:
    code = "from flextron.kernels.build import load_library; load_library('decoder'); load_library('training')"
    command = [sys.executable, "-c", code]
    broken = script(tmp_path / "broken", "echo 'error: no luck' >&2; exit 1")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CXX": str(broken)}, check=True)
    assert done.stdout == ""
    building, failed = done.stderr.strip().splitlines()
    assert "compiled for this processor" in building
    assert "error: no luck" in failed


@needs_compiler
def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "set XDG_CACHE_HOME to another" in str(load_library("decoder"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    load_library.cache_clear()
    assert "no home directory" in str(load_library("decoder"))

"""Reading with bounds; replacing a directory, and being killed at it: a kill runs no clean-up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flextron import files
from flextron.errors import FlextronError

# Writes over a directory in a forked process that ends at its n-th line of files.py, n = 1, 2, … until it gets through.
KILLED_AT_EVERY_LINE = """
import os, sys
from pathlib import Path
from flextron import files

path = Path(sys.argv[1])

def replaced_until(moment):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            count += 1
            if count == moment:
                os._exit(9)
        return trace
    sys.settrace(trace)
    with files.new_directory(path, overwrite=True) as temporary:
        (temporary / "content").write_text("new")
    os._exit(0)

moment, code = 0, 9
while code == 9:
    moment += 1
    (path / "content").write_text("old")
    child = os.fork()
    if child == 0:
        replaced_until(moment)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, (path / "content").read_text() if path.exists() else "lost")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two directories in one step")
def test_a_directory_that_is_replaced_is_there_whenever_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir()
    command = [sys.executable, "-c", KILLED_AT_EVERY_LINE, str(path)]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    *killed, last = done.stdout.splitlines()
    assert last == "0 new"
    assert {"9 old", "9 new"} == set(killed)
    # old until some moment, and new from then on
    assert killed == sorted(killed, reverse=True)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_directories_have_the_modes_of_their_neighbours(tmp_path: Path, mask: int) -> None:
    """Of what `open` and `mkdir` would give, whichever library writes them."""
    before = os.umask(mask)
    try:
        with files.new_directory(tmp_path / "model") as temporary:
            save_file({"a": torch.ones(2)}, temporary / "model.safetensors")
            (temporary / "config.json").write_text("{}")
            (temporary / "latency").mkdir()
        with files.new_file(tmp_path / "routers.safetensors") as temporary:
            save_file({"a": torch.ones(2)}, temporary)
        files.write_json(tmp_path / "frontier.json", {})
        (tmp_path / "neighbour").mkdir()
        (tmp_path / "neighbour.txt").write_text("")
    finally:
        os.umask(before)
    modes = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert {name: mode for name, mode in modes.items() if name not in ("neighbour", "neighbour.txt")} == {
        "model": modes["neighbour"],
        "model/latency": modes["neighbour"],
        "model/model.safetensors": modes["neighbour.txt"],
        "model/config.json": modes["neighbour.txt"],
        "routers.safetensors": modes["neighbour.txt"],
        "frontier.json": modes["neighbour.txt"],
    }


def test_a_directory_that_is_replaced_stays_as_private_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir(mode=0o700)
    with files.new_directory(tmp_path / "model", overwrite=True) as temporary:
        (temporary / "config.json").write_text("{}")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b"9" * 5000, "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FlextronError, match=said):
        files.read_json(tmp_path / "a.json")


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe", "directory", "zero"):
        with pytest.raises(FlextronError, match="is not a regular file"):
            files.read_json(tmp_path / f"{name}.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(FlextronError, match="10000000000 bytes, more than"):
        files.read_json(tmp_path / "large.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(FlextronError, match="cannot be read"):
        files.read_json(tmp_path / "loop.json")

"""Replacing a directory, and being killed at it: unlike an exception, a kill runs no clean-up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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

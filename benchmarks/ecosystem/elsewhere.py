"""Tests that run in other environments: other programs and versions, which cannot stand beside ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Figure, LeftOutError

__all__ = ["clients", "oldest_transformers", "onnx_and_openvino"]


def _environment(variable: str, default: str, remedy: str) -> Path:
    """The directory of an environment.

    Raises:
        LeftOutError: there is none.
    """
    found = Path(os.environ.get(variable, default)).resolve()
    if not (found / "bin" / "python").exists():
        raise LeftOutError(f"there is no environment {default}, and {variable} names none: {remedy}")
    return found


def _tests(python: Path | str, name: str, note: str, *arguments: str, **env: str) -> Figure:
    """A figure: the part of some tests that pass.

    Raises:
        LeftOutError: they did not run.
    """
    command = [str(python), "-m", "pytest", "-q", "-n", "0", "--timeout", "600", *arguments]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    last = (done.stdout.splitlines() or [""])[-1]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|errors?)", last)}
    if not counts:
        raise LeftOutError(f"the tests did not run: {(done.stderr or done.stdout)[-300:]}")
    total = sum(counts.values())
    return Figure(
        name=f"{name}: tests that pass",
        value=counts.get("passed", 0) / total,
        unit="of all",
        op="==",
        bar=1.0,
        note=f"{total} tests; {note}",
    )


def clients() -> Figure:
    """Clients of the server."""
    own = _environment("FLEXTRON_CLIENTS", ".venv/clients", "run `make test-clients`")
    note = "docs/reference/clients.md lists clients, versions and features; lm-eval has a row of its own"
    here = ["-m", "not slow", "tests/server/clients"]
    return _tests(own / "bin/python", "clients of the server", note, *here, FLEXTRON_NODE_CLIENTS=str(own))


def oldest_transformers() -> Figure:
    """Exports in the oldest transformers that is supported."""
    own = _environment("FLEXTRON_OLDEST", ".venv/oldest", "run `make test-oldest`")
    note = "all families and kinds of tokenizers: tokens, chat templates and logits equal to those of transformers 5"
    here = ["-m", "peer", "tests/test_oldest_transformers.py"]
    return _tests(
        sys.executable, "exports in transformers 4.57", note, *here, FLEXTRON_OLDEST_PYTHON=str(own / "bin/python")
    )


def onnx_and_openvino() -> Figure:
    """Exports in ONNX Runtime and OpenVINO."""
    own = _environment("FLEXTRON_OPTIMUM", ".venv/optimum", "run `make test-optimum`")
    note = "logits and 16 greedy tokens against transformers, by optimum's exporters"
    here = ["-m", "peer", "tests/export/test_onnx_openvino.py"]
    return _tests(own / "bin/python", "exports in ONNX Runtime and OpenVINO", note, *here)

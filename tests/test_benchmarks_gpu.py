"""The GPU suite where there is no GPU: it says so, and its rehearsal runs every row."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=BARE, capture_output=True, text=True, timeout=280, check=False)


def test_without_a_gpu_it_says_so_and_writes_nothing() -> None:
    before = (ROOT / "benchmarks/results/gpu.json").exists()
    done = suite("gpu")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "the gpu suite needs a CUDA device; --rehearse runs it with a tiny model on the CPU"
    )
    assert (ROOT / "benchmarks/results/gpu.json").exists() == before


def test_only_it_can_be_rehearsed() -> None:
    done = suite("core", "--rehearse")
    assert done.returncode == 2
    assert "--rehearse goes with the suite gpu alone" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_runs_every_row() -> None:
    done = suite("gpu", "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"figures mean nothing: (\S+)", done.stdout)
    assert found is not None
    result = json.loads(Path(found[1]).read_text(encoding="utf-8"))
    assert len(result["figures"]) == 13
    assert not result["left_out"]
    assert result["hardware"]["gpu"] is None
    assert all(figure["value"] > 0 for figure in result["figures"])
    exact = result["figures"][0]
    assert exact["name"].startswith("greedy tokens")
    assert exact["value"] == 100


def test_a_failing_row_is_left_out_and_the_others_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import _kept_apart
    from benchmarks.harness import Figure, run_suite

    def good() -> Figure:
        """A row."""
        return Figure(name="a", value=1.0, unit="x", op=">=", bar=0.5)

    def bad() -> Figure:
        """Another row."""
        raise RuntimeError("no kernel image")

    failed: list[str] = []
    run_suite("gpu", [_kept_apart(bad, failed), _kept_apart(good, failed)], tmp_path)
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [figure["name"] for figure in result["figures"]] == ["a"]
    assert result["left_out"] == {"Another row": "failed: RuntimeError: no kernel image"}
    assert failed == ["Another row"]
    assert "no kernel image" in capsys.readouterr().err

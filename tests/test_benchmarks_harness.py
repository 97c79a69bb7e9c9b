"""What all suites of benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import Figure, run_suite


def good() -> Figure:
    """A figure that can be measured."""
    return Figure(name="good", value=2.0, unit="x", op=">=", bar=1.0)


def broken() -> Figure:
    """A figure that fails."""
    raise AttributeError("no such thing")


def test_a_figure_that_fails_loses_no_other(tmp_path: Path) -> None:
    assert run_suite("some", [good], tmp_path)
    assert not run_suite("some", [good, broken, good], tmp_path)
    written = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))
    assert [f["name"] for f in written["figures"]] == ["good", "good"]
    assert "no such thing" in written["left_out"]["A figure that fails"]

"""The history of figures, on results that were made up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import keep
from benchmarks.history import Entry, entries_of, read_history, worse
from flextron.errors import FlextronError


def figure(name: str, value: float, unit: str = "x", op: str = ">=") -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "op": op, "bar": 1.0, "peer": None, "note": ""}


def write(results: Path, *figures: dict[str, Any], suite: str = "core", cores: int = 2, gpu: str | None = None) -> None:
    hardware = {"cpu": "Some CPU", "cores": cores, "threads": 2, "gpu": gpu}
    result = {"suite": suite, "commit": "abc1234", "date": "2026-01-02", "hardware": hardware, "figures": list(figures)}
    (results / f"{suite}{'-gpu' if gpu else ''}.json").write_text(json.dumps(result), encoding="utf-8")


def test_every_run_is_added_and_a_fallen_ratio_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, figure("speed", 2.0), figure("memory", 1.0, "ratio", "<="), figure("error", 1e-7, "nats", "<="))
    assert keep(["core"], tmp_path)
    write(tmp_path, figure("speed", 1.91), figure("memory", 1.04, "ratio", "<="), figure("error", 1e-3, "nats", "<="))
    assert keep(["core"], tmp_path)
    assert "worse" not in capsys.readouterr().out
    # against the last run, not the best one
    write(tmp_path, figure("speed", 1.80), figure("memory", 1.10, "ratio", "<="), figure("new", 3.0))
    assert not keep(["core"], tmp_path)
    said = capsys.readouterr().out
    assert "worse: core: speed: 1.8 x, which is 5.8% worse than 1.91 on 2026-01-02 (abc1234)" in said
    assert "worse: core: memory: 1.1 ratio, which is 5.8% worse than 1.04" in said
    assert said.count("worse:") == 2
    history = read_history(tmp_path / "history.jsonl")
    assert [(e.figure, e.value) for e in history if e.figure == "speed"] == [
        ("speed", 2),
        ("speed", 1.91),
        ("speed", 1.8),
    ]
    assert len(history) == 9
    write(tmp_path, figure("speed", 2.5), figure("memory", 0.5, "ratio", "<="))
    assert keep(["core"], tmp_path)


def test_other_machines_suites_and_counts_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, figure("speed", 2.0), figure("wins", 12.0, "of 12"), figure("shown", 100.0, "%", "=="))
    assert keep(["core"], tmp_path)
    write(tmp_path, figure("speed", 1.0), cores=64)
    assert keep(["core"], tmp_path)
    write(tmp_path, figure("speed", 1.0), suite="serving")
    assert keep(["serving"], tmp_path)
    write(tmp_path, figure("speed", 2.0), figure("wins", 3.0, "of 12"), figure("shown", 9.0, "%", "=="))
    assert keep(["core"], tmp_path)
    write(tmp_path, figure("kept", 0.9, "of the limit"))
    assert keep(["core"], tmp_path)
    write(tmp_path, figure("kept", 0.8, "of the limit"))
    assert not keep(["core"], tmp_path)


def test_of_two_result_files_of_a_suite_the_newer_counts(tmp_path: Path) -> None:
    write(tmp_path, figure("speed", 2.0))
    write(tmp_path, figure("speed", 9.0), gpu="Some GPU")
    os.utime(tmp_path / "core.json", (0, 0))
    keep(["core"], tmp_path)
    (entry,) = read_history(tmp_path / "history.jsonl")
    assert (entry.value, entry.machine) == (9.0, "Some GPU, Some CPU, 2 cores, 2 threads")


@given(before=st.floats(0.01, 1e3), gain=st.floats(0.5, 2), op=st.sampled_from([">=", "<="]))
def test_worse_is_more_than_five_percent(before: float, gain: float, op: str) -> None:
    def entry(value: float) -> Entry:
        return Entry(date="d", commit="c", machine="m", suite="s", figure="f", value=value, unit="ratio", op=op)

    after = before * gain if op == ">=" else before / gain
    if abs(gain - 0.95) > 1e-9:
        assert bool(worse([entry(before)], [entry(after)])) == (gain < 0.95)


@pytest.mark.parametrize("line", ["{", "[]", '{"figure": "speed"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, figure("speed", 2.0))
    keep(["core"], tmp_path)
    with (tmp_path / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(FlextronError, match="line 2 of"):
        read_history(tmp_path / "history.jsonl")


def test_the_results_of_this_repository_have_entries() -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    for path in results.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert [e.figure for e in entries_of(data)] == [f["name"] for f in data["figures"]]

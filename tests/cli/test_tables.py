"""Tables and bars on narrow terminals: nothing is cut, numbers stay whole, steps and time left are always there."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from flextron.cli.bars import ProgressLine
from flextron.cli.tables import print_one, print_rows

DEMO = [
    {
        "target": 1.0,
        "parameters": 134_515_008,
        "mem_mb": 538.1,
        "latency_ms": 26.62,
        "speed_up": 1.0,
        "perplexity_before": 19.44,
        "perplexity_after": 19.44,
        "gap_remaining": 0.0,
    },
    {
        "target": 0.5,
        "parameters": 67_000_512,
        "mem_mb": 268.0,
        "latency_ms": 13.31,
        "speed_up": 2.0,
        "perplexity_before": 1.234e5,
        "perplexity_after": 25.66,
        "gap_remaining": 0.4855,
    },
]
FRONTIER: list[dict[str, Any]] = [
    {
        "latency": 0.8923,
        "latency_ms": 26.62,
        "parameters": 134_515_008,
        "mem_mb": 538.1,
        "loss": 3.141,
        "found_as": "mix'n'match",
        "subnet": "30/30 layers, MLP 1152-1536, groups 2-3",
    },
    {
        "latency": 0.5,
        "latency_ms": 13.0,
        "parameters": 97_000_000,
        "mem_mb": None,
        "loss": 3.5,
        "found_as": "[bold]",
        "subnet": "24/30 layers, MLP 576, groups 1",
    },
]


def printed(rows: list[dict[str, Any]], width: int, title: str = "a title") -> str:
    console = Console(file=io.StringIO(), width=width)
    if len(rows) == 1:
        print_one(console, rows[0], title)
    else:
        print_rows(console, rows, title)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def words(rows: list[dict[str, Any]]) -> set[str]:
    """All that must be there in one piece: names' words, numbers, words of texts."""
    found = {word for row in rows for name in row for word in name.split("_")}
    for value in (value for row in rows for value in row.values()):
        if isinstance(value, str):
            found |= set(value.split())
        elif value is not None:
            found.add(f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    return found


@pytest.mark.parametrize("width", [120, 80, 60, 40, 32])
@pytest.mark.parametrize("rows", [DEMO, FRONTIER, FRONTIER[:1]], ids=["demo", "frontier", "one"])
def test_nothing_is_cut(rows: list[dict[str, Any]], width: int) -> None:
    title = "best sub-networks, measured on amd-epyc-9634-84-core-processor-2-threads-float32"
    text = printed(rows, width, title)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert not {w for w in words(rows) if w not in text.split()}
    assert "".join(title.split()) in "".join(text.split())


def test_80_columns_hold_the_demos_table_side_by_side() -> None:
    lines = printed(DEMO, 80).splitlines()
    assert any(all(word in line for word in ("134,515,008", "538.1", "26.62", "19.44")) for line in lines)


def test_tables_of_no_rows_have_a_title_alone() -> None:
    assert printed([], 80).split() == ["a", "title"]


@pytest.mark.parametrize("width", [120, 80, 60, 40, 30])
@pytest.mark.parametrize("name", ["training", "measuring the choices of the router of SmolLM2-135M-Instruct.Q8_0.gguf"])
def test_steps_and_time_left_survive(width: int, name: str) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    clock = iter(range(1000))
    bar = Progress(ProgressLine(console), console=console, get_time=lambda: next(clock))
    figures = ("loss 1.235", "kl 0.1234", "hidden 12.35", "lr 0.0004")
    task = bar.add_task(name, total=56_789, figures=figures)
    for done in (1000, 2000, 12_345):
        bar.update(task, completed=done)
    console.print(bar)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12345/56789" in text
    assert len(re.findall(r"\d:\d\d:\d\d", text)) >= (2 if width >= 40 else 1)
    assert "…" not in text
    assert "".join(name.split()) in "".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        assert "loss 1.235" in text
    assert not [f for f in figures if f.split()[0] in text and f not in text]

"""The figures in README.md and docs/benchmarks.md are those of benchmarks/results, and nothing else on a page moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import ROOT, Headline, headline_table, main
from flextron.errors import FlextronError

README = "# name\n\n<!-- figures: made by a script -->\nold\n<!-- /figures -->\n\nThe end, `<!-- figures -->`.\n"
PAGE = "# Benchmarks\n\n<!-- figures -->\n<!-- /figures -->\n"

SPEED: dict[str, Any] = {
    "name": "decode speed-up",
    "value": 1.8512345,
    "unit": "x",
    "op": ">=",
    "bar": 1.8,
    "peer": {"name": "full model, ms", "value": 20.0},
    "spread": [1.5, 1.8512345, 2.0],
    "note": "batch 1 | ctx 128",
    "holds": True,
}
MEMORY: dict[str, Any] = {
    "name": "peak memory",
    "value": float("inf"),
    "unit": "",
    "op": "<=",
    "bar": 1,
    "peer": None,
    "spread": None,
    "note": "",
    "holds": False,
}


def result(*figures: dict[str, Any], gpu: str | None = None) -> dict[str, Any]:
    return {
        "suite": "core",
        "commit": "abc1234",
        "date": "2026-01-02",
        "hardware": {"cpu": "Some CPU", "cores": 4, "threads": 2, "gpu": gpu},
        "versions": {"flextron": "0.1.0", "torch": "2.9.0"},
        "figures": list(figures),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    (tmp_path / "docs" / "benchmarks.md").write_text(PAGE, encoding="utf-8")
    return tmp_path


def write(root: Path, name: str, data: Any) -> None:
    (root / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")


def read(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


CHOSEN = (
    Headline(suite="core", figure="decode speed-up", title="speed", instead="the full model"),
    Headline(suite="core", figure="peak memory", title="memory", instead="nothing | none"),
)


def run(arguments: list[str], root: Path) -> int:
    return main(arguments, root, CHOSEN[:1])


def test_readme_has_the_headline_figures_beside_what_they_stand_against() -> None:
    other = SPEED | {"name": "not chosen", "holds": False}
    results = {"core": result(SPEED, other, MEMORY), "serving": result(gpu="Some GPU")}
    assert headline_table(results, CHOSEN) == (
        "| figure | measured | instead of | goal |\n"
        "|---|---|---|---|\n"
        "| speed | 1.851 x | the full model: 20 ms | ≥ 1.8 |\n"
        "| memory | inf | nothing \\| none | ≤ 1, **missed** |\n\n"
        "Measured by `make bench` (Some CPU, 4 cores, 2 threads; Some GPU, Some CPU, 4 cores, 2 threads). "
        "Of all 3 figures 2 miss their goal; [benchmarks](docs/benchmarks.md) shows them all.\n"
    )


def test_a_headline_of_a_suite_that_has_not_run_is_left_out() -> None:
    assert headline_table({"serving": result(SPEED)}, CHOSEN) == ""


def test_a_missing_headline_figure_is_an_error() -> None:
    with pytest.raises(FlextronError, match="peak memory"):
        headline_table({"core": result(SPEED)}, CHOSEN)


def test_the_readme_shows_six_figures_at_most_and_none_before_the_installation() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, after = text.partition("pip install")
    assert len(before.splitlines()) <= 25
    assert before.count("![") == 1
    assert "|" not in before
    assert 1 <= len([line for line in after.splitlines() if line.startswith("| ")]) - 1 <= 6


def test_documentation_has_spread_note_and_origin_of_every_suite(root: Path) -> None:
    write(root, "core", result(SPEED))
    write(root, "core-gpu", result(MEMORY, gpu="Some GPU"))
    assert run([], root) == 0
    page = read(root, "docs/benchmarks.md")
    assert "| decode speed-up | 1.851 x | ≥ 1.8 | 1.5 / 1.851 / 2 | full model, ms: 20 | batch 1 \\| ctx 128 |" in page
    assert "Some CPU, 4 cores, 2 threads. flextron 0.1.0, torch 2.9.0. Commit abc1234, 2026-01-02." in page
    assert "Some GPU, Some CPU, 4 cores, 2 threads." in page
    assert page.index("### core\n") < page.index("decode speed-up") < page.index("### core-gpu\n")
    assert page.index("### core-gpu\n") < page.index("peak memory")


def test_documentation_says_what_was_left_out(root: Path) -> None:
    write(root, "core", result(SPEED) | {"left_out": {"Against a peer": "It is not here: install it."}})
    assert run([], root) == 0
    assert "\nLeft out: Against a peer. It is not here: install it.\n" in read(root, "docs/benchmarks.md")


def test_check_tells_stale_from_fresh_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "core", result(SPEED))
    assert run(["--check"], root) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert (read(root, "README.md"), read(root, "docs/benchmarks.md")) == (README, PAGE)
    assert run([], root) == 0
    assert run(["--check"], root) == 0
    write(root, "core", result(SPEED | {"value": 1.9}))
    assert run(["--check"], root) == 1


def test_filling_again_changes_nothing(root: Path) -> None:
    write(root, "core", result(SPEED))
    run([], root)
    before = read(root, "README.md")
    run([], root)
    assert read(root, "README.md") == before


def test_without_results_the_blocks_are_empty(root: Path) -> None:
    assert run([], root) == 0
    assert "<!-- figures: made by a script -->\n<!-- /figures -->\n" in read(root, "README.md")
    assert read(root, "docs/benchmarks.md") == PAGE


@pytest.mark.parametrize("text", ["# no block\n", PAGE + PAGE], ids=["none", "two"])
def test_a_page_needs_exactly_one_block(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
    assert run([], root) == 2
    assert "exactly one block" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"suite": "core"}'], ids=["cut off", "list", "keys missing"])
def test_a_damaged_result_is_named(root: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "benchmarks" / "results" / "core.json").write_text(content, encoding="utf-8")
    assert run([], root) == 2
    assert "core.json" in capsys.readouterr().err


def test_an_unknown_argument_is_refused(root: Path) -> None:
    assert run(["--chek"], root) == 2


def test_the_repository_shows_its_own_results() -> None:
    assert main(["--check"]) == 0, "run python -m benchmarks.readme"

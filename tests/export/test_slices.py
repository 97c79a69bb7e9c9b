"""The table of slices: its form is Gemma 3n's, and its rows are the sub-networks that the form can say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from flextron.errors import FlextronError
from flextron.export import write_slices
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES
from tests.export.sources import measured, random_source

FULL = SubnetSpec.of([40] * 3, [2] * 3)
MIXED, SKIPPED = SubnetSpec.of([8, 24, 40], [2, 2, 2]), SubnetSpec.of([8, 0, 40], [2, 0, 2])
NO_SLICES = (SubnetSpec.of([8, 24, 40], [1, 2, 2]), SubnetSpec.of([8, 0, 40], [2, 2, 2]))


def test_rows_say_what_the_sub_networks_are(tmp_path: Path) -> None:
    frontier = measured(random_source(CASES["llama"]), MIXED, SKIPPED, *NO_SLICES)
    assert write_slices(tmp_path / "slices.csv", frontier, FULL) == 3
    with (tmp_path / "slices.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 3
    points = {point.spec: point for point in frontier.points}
    for spec in (FULL, MIXED, SKIPPED):
        (row,) = [r for r in rows.values() if float(r["# Effective Params (B)"]) == points[spec].params / 1e9]
        # as mistral.rs does: one width for each layer that is left, and the numbers of those that are not
        skipped = json.loads(row["Layers Skipped"] or "[]")
        widths = json.loads(row["FFN Hidden Dims"])
        assert len(widths) == int(row["# Layers"]) == 3 - len(skipped)
        kept = [i for i in range(3) if i not in skipped]
        assert [spec.layers[i].intermediate_size for i in kept] == widths
        assert list(spec.kept_layers) == kept
        assert row["MMLU PT accuracy"] == f"loss {points[spec].loss:.4f}"
    assert rows["full"]["Layers Skipped"] == ""


def test_a_table_of_nothing_is_refused(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    with pytest.raises(FlextronError, match="profile"):
        write_slices(tmp_path / "slices.csv", None, FULL)
    frontier = measured(source, *NO_SLICES)
    only = type(frontier).of(frontier.device, frontier.text, [p for p in frontier.points if p.spec in NO_SLICES])
    with pytest.raises(FlextronError, match="none of the measured sub-networks is a slice"):
        write_slices(tmp_path / "slices.csv", only, FULL)
    (tmp_path / "slices.csv").write_text("mine")
    with pytest.raises(FlextronError, match="exists already"):
        write_slices(tmp_path / "slices.csv", frontier, FULL)
    assert (tmp_path / "slices.csv").read_text() == "mine"

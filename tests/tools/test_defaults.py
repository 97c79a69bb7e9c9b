"""Tables of options and defaults in the documentation are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.defaults import PAGES, ROOT, SETTINGS, fill, main, table


def test_the_repository_shows_its_own_defaults() -> None:
    assert main(["--check"]) == 0, "run python -m tools.defaults"


def test_every_settings_class_and_verb_has_a_table() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    verbs = ("demo", "convert", "train", "profile", "route", "generate", "eval", "serve", "finetune", "bench serve")
    names = [*SETTINGS, *(f"flextron {verb}" for verb in verbs)]
    assert [name for name in names if f"<!-- defaults: {name} -->" not in text] == []


def test_a_table_has_names_defaults_and_meanings() -> None:
    lines = table("TrainRecipe").splitlines()
    assert lines[0] == "| entry | default | meaning |"
    assert any(line.startswith("| `lr` | 0.0004 | Peak learning rate") for line in lines)
    assert any(line.startswith("| `--lr` | 0.0004 | ") for line in table("flextron train").splitlines())
    assert any(line.startswith("| `--tiny` | off | ") for line in table("flextron demo").splitlines())


def test_a_stale_table_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for page in PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    recipes = tmp_path / "docs/guides/recipes.md"
    right = recipes.read_text(encoding="utf-8")
    recipes.write_text(right.replace("| 0.0004 |", "| 0.0006 |"), encoding="utf-8")
    assert main(["--check"], tmp_path) == 1
    assert "recipes.md is out of date" in capsys.readouterr().out
    assert main([], tmp_path) == 0
    assert recipes.read_text(encoding="utf-8") == right


def test_text_outside_the_blocks_is_kept() -> None:
    page = "# A\n\n<!-- defaults: ProfileStage -->\nold\n<!-- /defaults -->\n\nThe end, `<!-- defaults: x -->`.\n"
    filled = fill(page)
    assert filled.startswith("# A\n\n<!-- defaults: ProfileStage -->\n\n| entry |")
    assert filled.endswith(" |\n\n<!-- /defaults -->\n\nThe end, `<!-- defaults: x -->`.\n")
    assert fill(filled) == filled

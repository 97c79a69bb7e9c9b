"""The documentation names files that exist, its walks through the code stay short, and docstrings are sentences."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(r"`([a-z_]+(?:/[A-Za-z0-9_]+)*/[A-Za-z0-9_]+\.(?:py|cpp|h))`|`(files\.py)`")
WALKS = {
    "From a target to the kernel": 14,
    "From a token to the answer": 12,
    "From an example to an optimizer step": 18,
    "From a pretrained weight to the saved one": 12,
}


def named_files(text: str) -> set[str]:
    """Files of the code that a text names in backticks."""
    return {first or second for first, second in NAMED.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = named_files(page.read_text(encoding="utf-8"))
    assert [n for n in sorted(names) if not any((r / n).is_file() for r in (ROOT / "src" / "flextron", ROOT))] == []


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_has_eight_steps_and_says_how_many_files_it_passes(title: str) -> None:
    _, _, rest = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")
    walk = rest.partition("\n## ")[0]
    count = len(named_files(walk))
    assert f"{count} files." in walk
    assert count <= WALKS[title]
    assert re.findall(r"^(\d+)\. ", walk, re.MULTILINE) == [str(i) for i in range(1, 9)]


def test_the_pattern_finds_files_and_nothing_else() -> None:
    text = "`model/nested.py` `files.py` `kernels/csrc/simd.h` `model/nested.py:3` `chat.py` `docs/index.md` `a/b`"
    assert named_files(text) == {"model/nested.py", "files.py", "kernels/csrc/simd.h"}


FRAGMENT = re.compile(r"(Of|Likewise|That|By|In|As|On|Within|All of)\b")
PACKAGE = ROOT / "src" / "flextron"


def fragments(source: str) -> list[str]:
    """Docstrings, of fields too, that begin in the middle of a sentence."""
    strings = (
        statement.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
    return [text for text in strings if isinstance(text, str) and FRAGMENT.match(text)]


def test_docstrings_do_not_begin_in_the_middle_of_a_sentence() -> None:
    found = {p.relative_to(PACKAGE).as_posix(): fragments(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")}
    assert {path: texts for path, texts in found.items() if texts} == {}


def test_fragments_are_found_in_modules_functions_and_fields() -> None:
    source = '"""Of a."""\ndef f():\n    """Likewise."""\nclass C:\n    """Fine."""\n    x = 1\n    """Of x."""\n'
    assert sorted(fragments(source)) == ["Likewise.", "Of a.", "Of x."]

"""English prose that lies on every machine with Python, so that a demonstration needs no download.

Notable: documentation strings are taken from source files by parsing, never by importing them. Python's own language
reference, which the interactive help carries, serves as held-out text; `drop_overlaps` keeps the two apart.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

__all__ = ["drop_overlaps", "pydoc_topics", "python_docstrings"]

_PACKAGES = ("torch", "transformers", "numpy", "datasets", "accelerate")
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages"})
_MIN_DOCSTRING_CHARS = 200
_MIN_TOPIC_CHARS = 500
_SHUFFLE_SEED = 0
_WORD = re.compile(r"[^\W_]+")
_BLANK_LINES = re.compile(r"\n\s*\n")


def python_docstrings(*, max_chars: int) -> list[str]:
    """Docstrings of the standard library and then of packages that are installed beside this one.

    A document is made of the docstrings of one source file that have at least 200 characters, in their order there,
    parted by blank lines; a docstring that came before in another file is left out. Files come in an order that is
    shuffled but always the same on one machine, so that any prefix is a mixture.

    Args:
        max_chars: where to stop, in characters; the last document is cut there.
    """
    seen: set[str] = set()
    documents: list[str] = []
    num_left = max_chars
    for path in _source_files():
        fresh = [doc for doc in dict.fromkeys(_docstrings(path)) if doc not in seen]
        if not fresh:
            continue
        if num_left <= 0:
            break
        seen.update(fresh)
        documents.append("\n\n".join(fresh)[:num_left])
        num_left -= len(documents[-1])
    return documents


def _source_files() -> Iterator[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    packages: list[Path] = []
    for name in _PACKAGES:
        spec = find_spec(name)
        if spec is not None:
            packages += map(Path, spec.submodule_search_locations or ())
    for group in (roots, packages):
        files = [path for root in group for path in _python_files(root)]
        random.Random(_SHUFFLE_SEED).shuffle(files)
        yield from files


def _python_files(root: Path) -> list[Path]:
    """Source files under a folder, sorted, but for tests."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Pruned rather than filtered: all installed packages may lie below the standard library.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += (Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(found)


def _docstrings(path: Path) -> Iterator[str]:
    """The long docstrings of a file's module, classes and functions, in order; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's source are not our user's business
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _docstrings_of(module)


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text is not None:
        cleaned = inspect.cleandoc(text)
        if len(cleaned) >= _MIN_DOCSTRING_CHARS:
            yield cleaned
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_of(child)


def pydoc_topics() -> list[str]:
    """The language reference that Python's `help` carries: a document a topic, sorted by name, without short ones."""
    return [text for _, text in sorted(topics.items()) if len(text) >= _MIN_TOPIC_CHARS]


def drop_overlaps(documents: Iterable[str], held_out: Iterable[str], *, num_words: int = 13) -> list[str]:
    """Drop the paragraphs that share a run of words with held-out text, and documents of which nothing is left.

    Words are casefolded runs of letters and digits; paragraphs are parted by blank lines. A run that reaches over
    several paragraphs drops them all, so that no document returned has a run in common with any held-out text.

    Args:
        documents: training text.
        held_out: text that training must not see.
        num_words: length of a run, at least 1. Held-out texts of fewer words have none.

    Returns:
        The documents in their order; those without overlap are unchanged.
    """
    forbidden = {run for text in held_out for run in _runs(_words(text), num_words)}
    cleaned = (_without(document, forbidden, num_words) for document in documents)
    return [document for document in cleaned if document]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str], num_words: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(num_words)), strict=False)


def _without(document: str, forbidden: set[tuple[str, ...]], num_words: int) -> str:
    if forbidden.isdisjoint(_runs(_words(document), num_words)):
        return document
    paragraphs = _BLANK_LINES.split(document)
    # Dropping a paragraph makes neighbours of those around it, so look until nothing more is found.
    while touched := _touched(paragraphs, forbidden, num_words):
        paragraphs = [p for i, p in enumerate(paragraphs) if i not in touched]
    return "\n\n".join(paragraphs)


def _touched(paragraphs: list[str], forbidden: set[tuple[str, ...]], num_words: int) -> set[int]:
    """Indices of the paragraphs that hold a word of a forbidden run."""
    words = [_words(paragraph) for paragraph in paragraphs]
    owners = [i for i, own in enumerate(words) for _ in own]
    runs = _runs([word for own in words for word in own], num_words)
    return {i for start, run in enumerate(runs) if run in forbidden for i in owners[start : start + num_words]}

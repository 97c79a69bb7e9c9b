"""Docstrings are gathered without importing, reproducibly; overlaps are removed as a brute-force search says."""

from __future__ import annotations

import textwrap
from importlib.machinery import ModuleSpec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.texts import machine_text
from flextron.texts.machine_text import drop_overlaps, pydoc_topics, python_docstrings


def prose(word: str, num_chars: int = 240) -> str:
    """Text of two lines and the given length."""
    half = num_chars // 2
    return (word * num_chars)[: half - 1] + "\n" + (word * num_chars)[: num_chars - half]


def function(name: str, docstring: str) -> str:
    """Source of a function whose docstring is indented as usual."""
    return f'def {name}():\n    """{textwrap.indent(docstring, "    ").lstrip()}\n    """\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up standard library with one package, `torch`, beside it."""
    stdlib, torch = tmp_path / "stdlib", tmp_path / "torch"
    monkeypatch.setattr(machine_text.sysconfig, "get_path", lambda _: str(stdlib))

    def find_spec(name: str) -> ModuleSpec | None:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(torch)]
        return spec if name == "torch" else None

    monkeypatch.setattr(machine_text, "find_spec", find_spec)
    stdlib.mkdir()
    torch.mkdir()
    return tmp_path


def test_what_counts_as_docstring(library: Path) -> None:
    """Module, class, method and function; long, cleaned and in order; the file is never run."""
    source = f'"""{prose("m")}"""\nraise RuntimeError("imported")\n' + function("f", prose("f"))
    source += 'class C:\n    """short"""\n' + textwrap.indent("async " + function("g", prose("g", 200)), "    ")
    source += function("h", prose("h", 199)) + f'x = """{prose("x")}"""\n'
    (library / "stdlib" / "a.py").write_text(source)
    assert python_docstrings(max_chars=10**6) == ["\n\n".join([prose("m"), prose("f"), prose("g", 200)])]


def test_what_is_passed_over(library: Path) -> None:
    """Tests, IDLE, installed packages below the library, broken files, and repeated docstrings."""
    for name in ("test", "x/tests", "idlelib", "lib2to3", "site-packages/p"):
        (library / "stdlib" / name).mkdir(parents=True)
        (library / "stdlib" / name / "a.py").write_text(f'"""{prose(name)}"""')
    (library / "stdlib" / "broken.py").write_text(f'"""{prose("b")}"""\nprint "python 2"')
    (library / "stdlib" / "latin.py").write_bytes(f'"""{prose("é")}"""'.encode("latin-1"))
    (library / "stdlib" / "null.py").write_bytes(f'"""{prose("n")}"""\0'.encode())
    for name in ("one.py", "two.py"):
        (library / "stdlib" / name).write_text(f'"""{prose("same")}"""\n' + function("f", prose("same")) + "'\\d'\n")
    assert python_docstrings(max_chars=10**6) == [prose("same")]


def test_order_is_fixed_mixed_and_the_library_comes_first(library: Path) -> None:
    """The same every time, not alphabetical, and any smaller budget gives a prefix."""
    names = [chr(ord("a") + i) for i in range(20)]
    for folder, shift in (("stdlib", str.lower), ("torch", str.upper)):
        for name in names:
            (library / folder / f"{name}.py").write_text(f'"""{prose(shift(name))}"""')
    documents = python_docstrings(max_chars=10**6)
    first_letters = "".join(d[0] for d in documents)
    assert first_letters[:20].islower()
    assert first_letters[20:].isupper()
    assert sorted(first_letters[:20]) == names != list(first_letters[:20])
    assert python_docstrings(max_chars=10**6) == documents
    for max_chars in (0, 1, 240, 241, 1000, 20 * 240):
        assert "".join(python_docstrings(max_chars=max_chars)) == "".join(documents)[:max_chars]


def test_this_machine_has_text() -> None:
    """The real library fills a budget to the character, mostly with words."""
    documents = python_docstrings(max_chars=100_000)
    text = "".join(documents)
    assert len(text) == 100_000
    assert len(documents) > 5
    assert sum(c.isalpha() or c.isspace() for c in text) > 0.8 * len(text)


def test_pydoc_topics() -> None:
    """The long ones, by name."""
    texts = pydoc_topics()
    assert min(map(len, texts)) >= 500
    assert [t for t in (topics[k] for k in sorted(topics)) if t in set(texts)] == texts
    assert sum(len(t) for t in topics.values()) - sum(map(len, texts)) < 500 * len(topics)
    assert sum(map(len, texts)) > 300_000


def reference_words(text: str) -> list[str]:
    """Words by looking at each character."""
    return "".join(c if c.isalnum() else " " for c in text.casefold()).split()


def share_a_run(one: str, other: str, num_words: int) -> bool:
    """Compare every place of one text with every place of the other."""
    a, b = reference_words(one), reference_words(other)
    return any(
        a[i : i + num_words] == b[j : j + num_words]
        for i in range(len(a) - num_words + 1)
        for j in range(len(b) - num_words + 1)
    )


words = st.sampled_from(["a", "B", "b", "straße", "STRASSE", "x_a", "a-b", "7", "\n\n", "\n \n", "\n", "!"])
texts = st.lists(words, max_size=14).map(" ".join)


@given(documents=st.lists(texts, max_size=4), held_out=st.lists(texts, max_size=3), num_words=st.integers(1, 5))
def test_no_shared_run_survives_and_nothing_else_goes(
    documents: list[str], held_out: list[str], num_words: int
) -> None:
    """Clean documents stay as they are; of others, whole paragraphs are left, in order."""
    kept = drop_overlaps(documents, held_out, num_words=num_words)
    assert not any(share_a_run(k, h, num_words) for k in kept for h in held_out)
    clean = [d for d in documents if d and not any(share_a_run(d, h, num_words) for h in held_out)]
    rest = iter(kept)
    assert all(document in rest for document in clean)
    paragraphs = iter([p.split() for d in documents for p in d.replace("\n \n", "\n\n").split("\n\n")])
    assert all(p.split() in paragraphs for k in kept for p in k.replace("\n \n", "\n\n").split("\n\n"))


def test_only_the_paragraphs_touched_are_dropped() -> None:
    """By default thirteen words, whatever the case and the punctuation; one word less is no overlap."""
    run = [f"word{i}" for i in range(13)]
    overlapping = "Here " + ", ".join(run).upper() + "!"
    near = " ".join(run[:12]) + " other"
    document = f"First.\n\n{overlapping}\n  \n    Indented.\n\n{near}"
    assert drop_overlaps([document, overlapping, near], [f"x {' '.join(run)} y"]) == [
        f"First.\n\n    Indented.\n\n{near}",
        near,
    ]


def test_a_run_over_several_paragraphs_drops_them_all() -> None:
    """Also one that only comes about when a paragraph between has been dropped."""
    assert drop_overlaps(["a b\n\nc d\n\ne"], ["b c"], num_words=2) == ["e"]
    assert drop_overlaps(["a\n\nx y\n\nb\n\nc"], ["x y", "a b"], num_words=2) == ["c"]


def test_words_are_casefolded() -> None:
    """Spellings that only full case folding makes equal."""
    assert drop_overlaps(["die STRASSE", "die_Gasse"], ["Die straße", "gasse"], num_words=2) == ["die_Gasse"]
    assert drop_overlaps(["die_Gasse"], ["gasse"], num_words=1) == []

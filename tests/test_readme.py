"""README and documentation: snippets are marked as they should be, and relative links lead somewhere.

A snippet is run when the line before its fence is `<!-- test -->`: `test_installed.py` runs those of all pages, and the
commands, from an installed wheel, each alone and offline in an empty directory.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny import make_tiny_llama

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [page for page in (README, *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]

MARK = re.compile(r"^<!-- test -->$", re.MULTILINE)
SNIPPET = re.compile(r"^<!-- test -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""\]\(<?([^)\s>]+)[^)]*\)|(?:src|href)=["']([^"']+)["']""")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#", re.IGNORECASE)


def snippets(text: str) -> list[tuple[int, str]]:
    """The marked snippets, each with the number of lines above its first."""
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in SNIPPET.finditer(text)]


def relative_links(text: str) -> list[str]:
    """Targets of links and images within the repository, without their anchors; code is left out."""
    targets = [match[1] or match[2] for match in LINK.finditer(CODE.sub("", text))]
    return [target.split("#")[0] for target in targets if not ELSEWHERE.match(target)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_tiny_llama_is_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_llama(tmp_path / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny-llama")
    text = "Once upon a time – ça alors"
    batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == text
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama")(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, len(tokenizer))


@pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")
def test_readme_has_a_snippet_that_runs() -> None:
    assert snippets(README.read_text(encoding="utf-8")), "mark a ```python block of README.md with <!-- test -->"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_mark_stands_before_a_snippet(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(snippets(text)) == len(MARK.findall(text)), "<!-- test --> must be the line before ```python"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in relative_links(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not broken


SAMPLE = """\
# Page
[guide](guide.md#part) ![plot](img/plot.png "title") <img src="img/logo.svg" width="20">
[site](https://example.org) [anchor](#page) [mail](mailto:a@example.org) `[not](code.md)`

```python
text = "[neither](this.md)"
```

<!-- test -->
```python
x = 1
y = x
```
"""


def test_links_are_found_outside_code_and_within_the_repository() -> None:
    assert relative_links(SAMPLE) == ["guide.md", "img/plot.png", "img/logo.svg"]


def test_only_marked_snippets_are_found_with_their_place() -> None:
    ((offset, code),) = snippets(SAMPLE)
    assert code == "x = 1\ny = x\n"
    assert SAMPLE.splitlines()[offset] == "x = 1"

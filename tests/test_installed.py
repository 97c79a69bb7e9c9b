"""README and guides for a new user: snippets and commands, from an installed wheel, in a directory with nothing else.

What needs a running server is in `tests/server/test_guide.py`; what needs files that only the reader has is left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted(GUIDES.glob("*.md"))]
PYTHON = re.compile(r"^(<!-- test -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(
    r"path/to|texts/|--url|--server|--model NAME"  # files and servers of the reader
    r"|flextron (serve|demo$|demo --minutes|demo --from-scratch)|pip |make |curl |_KEY="  # servers, long runs, set-up
    r"|torchrun |accelerate "  # machines with several devices; tests/training/test_many_processes.py runs them here
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel installs it."""
    pytest.importorskip("hatchling")
    root = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(root / "site")]
    subprocess.run([*pip, str(wheel(ROOT, root))], check=True, capture_output=True)
    return root / "site"


def wheel(tree: Path, directory: Path) -> Path:
    """Build the wheel of a tree into a directory."""
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(directory)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True, text=True)
    return directory / done.stdout.split()[-1]


def run(installed: Path, directory: Path, *command: str) -> str:
    """Output of a command; the package comes from the wheel, not from this tree."""
    directory.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {
        "PYTHONPATH": str(installed),
        "PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_is_the_same_each_time(tmp_path: Path) -> None:
    """Also from another copy of the tree, whose files are younger."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    digests = {hashlib.sha256(wheel(root, tmp_path / root.name).read_bytes()).hexdigest() for root in (ROOT, copy)}
    assert len(digests) == 1


def test_it_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import flextron; print(flextron.__file__)"
    assert run(installed, tmp_path, sys.executable, "-c", code).startswith(str(installed))
    assert "convert" in run(installed, tmp_path, "flextron", "--help")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marked_snippet_alone(installed: Path, page: Path, tmp_path: Path) -> None:
    for number, (mark, code) in enumerate(PYTHON.findall(page.read_text(encoding="utf-8"))):
        if mark:
            run(installed, tmp_path / str(number), sys.executable, "-c", code)


def test_the_python_guide_in_order(installed: Path, tmp_path: Path) -> None:
    parts = [code for mark, code in PYTHON.findall((GUIDES / "python.md").read_text(encoding="utf-8")) if not mark]
    assert len(parts) > 6
    run(installed, tmp_path, sys.executable, "-c", "\n".join(parts))


@pytest.mark.parametrize("page", [*PAGES[:2], GUIDES / "command-line.md"], ids=lambda page: page.name)
def test_the_commands_in_order(installed: Path, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "README.md":  # its commands go on where its snippet ended
        run(installed, tmp_path, sys.executable, "-c", PYTHON.findall(text)[0][1])
    lines = [line.partition("  #")[0].strip() for block in SHELL.findall(text) for line in block.splitlines()]
    lines = [line for line in lines if line and not ELSEWHERE.search(line)]
    assert len(lines) > 1
    for line in lines:
        assert "…" not in run(installed, tmp_path, "bash", "-c", line), line

"""What each client can do with the server, as tests find it; `docs/reference/clients.md` has the table.

A test names a client and what it does with a mark. `make test-clients` runs all of them, where all clients are
installed, and writes their outcomes to `results.json`.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

__all__ = ["CLIENTS", "NODE", "RESULTS", "client", "marked", "version_of", "write"]

RESULTS = Path(__file__).parent / "results.json"
NODE = os.environ.get("FLEXTRON_NODE_CLIENTS", "")
"""A directory with `node_modules`."""
CLIENTS = {
    "openai (Python)": "openai",
    "openai (Node)": "npm:openai",
    "AI SDK": "npm:ai",
    "Anthropic's client": "anthropic",
    "litellm": "litellm",
    "LangChain": "langchain-openai",
    "LlamaIndex": "llama-index-llms-openai-like",
    "instructor": "instructor",
    "pydantic-ai": "pydantic-ai-slim",
    "llm": "llm",
    "lm-eval": "lm_eval",
    "curl": "",
}
"""The package whose version counts; those of npm are named so."""


def client(name: str, feature: str) -> pytest.MarkDecorator:
    """A mark: the test shows that a client has a feature here."""
    assert name in CLIENTS
    return pytest.mark.client(name, feature)


def version_of(name: str) -> str:
    """The version of a client; nothing where it has none, or is not installed."""
    package = CLIENTS[name]
    if package.startswith("npm:"):
        found = Path(NODE) / "node_modules" / package.removeprefix("npm:") / "package.json"
        return str(json.loads(found.read_text(encoding="utf-8"))["version"]) if found.exists() else ""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return ""


def marked() -> Iterator[tuple[str, str]]:
    """Client and feature of each marked test in this folder."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "client":
                yield tuple(ast.literal_eval(argument) for argument in node.args)  # type: ignore[misc]


def write(outcomes: dict[tuple[str, str], bool], path: Path = RESULTS) -> None:
    """Write outcomes, by client in the order of `CLIENTS`."""
    found: dict[str, Any] = {}
    for name in CLIENTS:
        features = {feature: passed for (owner, feature), passed in outcomes.items() if owner == name}
        if features:
            found[name] = {"version": version_of(name), "features": features}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

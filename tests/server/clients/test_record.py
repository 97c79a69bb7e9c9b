"""What the documentation says of clients is what their tests found."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from tests.server.clients.record import CLIENTS, RESULTS, marked, write


def test_the_record_has_every_test_and_no_failure() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    outcomes = {(name, f): passed for name, entry in found.items() for f, passed in entry["features"].items()}
    assert outcomes.keys() == set(marked()), "run make test-clients"
    assert all(outcomes.values())
    assert list(found) == list(CLIENTS)


def test_what_fails_is_written(tmp_path: Path) -> None:
    write({("curl", "b"): False, ("litellm", "a"): True}, tmp_path / "made.json")
    found = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert list(found) == ["litellm", "curl"]
    assert found["curl"] == {"version": "", "features": {"b": False}}
    assert found["litellm"]["version"] == version("litellm")

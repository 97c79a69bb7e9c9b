"""What every test gets: no network, and property tests without a stopwatch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

# Read when the libraries are imported, hence before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Deadlines measure the machine's other work, not ours. Explaining failures traces every line in all examples, which
# takes several times as long as the examples themselves.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("flextron", deadline=None, print_blob=True, phases=_PHASES)
settings.load_profile("flextron")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the kernels where that is still to be done: on a busy machine it outlasts what tests wait for."""
    from flextron.kernels.build import load_library

    if session.items and not session.config.option.collectonly:
        load_library("decoder")
        load_library("training")


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a path: a socket between processes
    host = str(address[0])
    return host in ("localhost", "::1") or host.startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Iterator[None]:
    """Refuse connections that leave the machine, so that no test passes only where the network does."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            raise RuntimeError(f"tests run offline, but something connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield

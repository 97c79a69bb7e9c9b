"""A server with a short template for tools, and the record of what clients can do."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.server.clients.record import write
from tests.server.running import SHORT_TEMPLATE, Running, running_chat

_OUTCOMES: dict[tuple[str, str], bool] = {}


@pytest.fixture(scope="session")
def tool_server() -> Iterator[Running]:
    """Of a model whose template knows tools."""
    with running_chat(SHORT_TEMPLATE) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether all tests of a client's feature passed."""
    report = yield
    for mark in reversed([*item.iter_markers("client")]):
        name, feature = mark.args
        if report.failed or (report.when == "call" and report.passed):
            _OUTCOMES[name, feature] = _OUTCOMES.get((name, feature), True) and report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record, where that is asked for."""
    if os.environ.get("FLEXTRON_RECORD_CLIENTS"):
        write(_OUTCOMES)

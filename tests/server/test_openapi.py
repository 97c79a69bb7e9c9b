"""`/openapi.json` says what the server does: schemathesis makes requests out of it and compares."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.running import Running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def check_operations(server: Running, max_examples: int) -> int:
    """Each operation so many times; how many there are."""
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    session = requests.Session()
    for operation in operations:

        @settings(
            max_examples=max_examples,
            phases=[Phase.generate],
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(base_url=server.url, session=session, checks=CHECKS, timeout=30)

        check()
    session.close()
    return len(operations)


def test_the_document_holds(chat_server: Running) -> None:
    assert check_operations(chat_server, 10) == 16


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_document_holds_for_long(chat_server: Running) -> None:
    check_operations(chat_server, 1000)
    chat_server.wait_until_idle()


def test_bodies_and_refusals_are_described(chat_server: Running) -> None:
    found = httpx.get(f"{chat_server.url}/openapi.json").json()
    for path, kind in (("/v1/completions", "CompletionBody"), ("/v1/chat/completions", "ChatBody")):
        post = found["paths"][path]["post"]
        (body,) = post["requestBody"]["content"].values()
        assert body["schema"] == {"$ref": f"#/components/schemas/{kind}"}
        assert "flextron" in found["components"]["schemas"][kind]["properties"]
        assert {"400", "401", "404", "408", "413", "429", "500", "503"} < post["responses"].keys()
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}

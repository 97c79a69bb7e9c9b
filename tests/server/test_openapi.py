"""`/openapi.json` says what the server does: schemathesis makes requests out of it and compares."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.running import Running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PLAIN = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(scope="module")
def document(chat_server: Running) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{chat_server.url}/openapi.json").json())


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=20, **PLAIN)
def test_the_document_holds(case: Any, chat_server: Running) -> None:
    case.call_and_validate(base_url=chat_server.url, checks=CHECKS, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@schema.parametrize()
@settings(max_examples=1000, **PLAIN)
def test_the_document_holds_for_long(case: Any, chat_server: Running) -> None:
    case.call_and_validate(base_url=chat_server.url, checks=CHECKS, timeout=30)


def test_bodies_and_refusals_are_described(chat_server: Running) -> None:
    found = httpx.get(f"{chat_server.url}/openapi.json").json()
    for path, kind in (("/v1/completions", "CompletionBody"), ("/v1/chat/completions", "ChatBody")):
        post = found["paths"][path]["post"]
        (body,) = post["requestBody"]["content"].values()
        assert body["schema"] == {"$ref": f"#/components/schemas/{kind}"}
        assert "flextron" in found["components"]["schemas"][kind]["properties"]
        assert {"400", "401", "404", "408", "413", "429", "500", "503"} < post["responses"].keys()
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}

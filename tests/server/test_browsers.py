"""What a web page in the reader's browser may make of a server on the same machine: nothing."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import httpx
import pytest

from flextron import ElasticModel
from flextron.server.browsers import is_loopback
from tests.jobs.making import RECORDS, jsonl
from tests.server.running import KEY, Running, running
from tests.server.test_refusals import GOOD, assert_refused
from tests.server.tuning import tuning

EVIL = "http://evil.example"


def port(server: Running) -> str:
    return server.url.rpartition(":")[2]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1.evil.example", "1.2.3.4:{}", "x@y", "[1"]
)
def test_foreign_hosts(server: Running, host: str) -> None:
    headers = {"host": host.format(port(server))}
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/completions"), ("HEAD", "/metrics")):
        answer = httpx.request(method, server.url + path, headers=headers, json=GOOD if method == "POST" else None)
        assert answer.status_code == 403
        if method != "HEAD":
            assert assert_refused(answer, 403, "--allowed-host")["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{}", "127.0.0.1:{}", "127.1.2.3", "[::1]:{}", "a.localhost:{}"]
)
def test_own_hosts(server: Running, host: str) -> None:
    headers = {"host": host.format(port(server))}
    assert httpx.get(f"{server.url}/health", headers=headers).status_code == 200
    assert httpx.post(f"{server.url}/v1/completions", headers=headers, json=GOOD).status_code == 200


def test_the_operator_may_allow_hosts(model: ElasticModel) -> None:
    with running(model, allowed_hosts=("Models.example",)) as made:
        assert httpx.get(f"{made.url}/health", headers={"host": "models.example:80"}).status_code == 200
        assert httpx.get(f"{made.url}/health", headers={"host": "other.example"}).status_code == 403
    with running(model, allowed_hosts=None, api_key=KEY) as made:
        assert httpx.get(f"{made.url}/health", headers={"host": "other.example"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": EVIL, "sec-fetch-site": "cross-site"},
    ],
)
def test_foreign_origins(server: Running, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json=GOOD, headers=headers)
    assert assert_refused(answer, 403, "--api-key")["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/v1/models", headers=headers).headers


def test_own_origins_and_none(server: Running) -> None:
    own: list[dict[str, str]] = [
        {},
        {"origin": server.url},
        {"origin": server.url.replace("http", "https")},
        {"origin": server.url, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ]
    for headers in own:
        assert httpx.post(f"{server.url}/v1/completions", json=GOOD, headers=headers).status_code == 200


def test_a_key_is_proof_enough(model: ElasticModel) -> None:
    with running(model, api_key=KEY) as made:
        headers = {"origin": EVIL, "authorization": f"Bearer {KEY}"}
        assert httpx.post(f"{made.url}/v1/completions", json=GOOD, headers=headers).status_code == 200
        assert_refused(httpx.post(f"{made.url}/v1/completions", json=GOOD, headers={"origin": EVIL}), 401)


def test_compressed_bodies_are_refused_as_such(server: Running) -> None:
    content = gzip.compress(b'{"model": "tiny", "prompt": "a", "max_tokens": 1}')
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert assert_refused(answer, 415, "compressed")["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
def test_json_is_sent_as_json(server: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    content = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert assert_refused(answer, 415, "application/json")["code"] == "unsupported_media_type"
    for good in ("application/json", "Application/JSON; charset=utf-8"):
        answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"content-type": good})
        assert answer.status_code == 200


def test_pages_start_no_jobs(model: ElasticModel, tmp_path: Path) -> None:
    with tuning(model, tmp_path / "state") as made, httpx.Client(base_url=made.server.url) as client:
        form: Any = {"files": {"file": ("a.jsonl", jsonl(RECORDS))}, "data": {"purpose": "fine-tune"}}
        headers = {"origin": EVIL}
        assert_refused(client.post("/v1/files", headers=headers, **form), 403)
        file_id = client.post("/v1/files", **form).json()["id"]
        body = {"model": "tiny", "training_file": file_id}
        assert_refused(client.post("/v1/fine_tuning/jobs", json=body, headers=headers), 403)
        assert_refused(client.post("/v1/fine_tuning/jobs", content=b"{}"), 415)
        job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        assert_refused(client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel", headers=headers), 403)
        assert_refused(client.delete(f"/v1/files/{file_id}", headers=headers), 403)
        # a quick machine has done the job by now
        assert client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code in (200, 400)


def test_head_is_get_without_a_body(server: Running) -> None:
    with httpx.Client(base_url=server.url) as client:
        for path in ("/health", "/v1/models", "/v1/models/tiny", "/openapi.json"):
            whole, head = client.get(path), client.head(path)
            assert head.status_code == whole.status_code == 200
            assert head.content == b""
            assert head.headers["content-length"] == str(len(whole.content))
            assert head.headers["content-type"] == whole.headers["content-type"]
        assert client.head("/metrics").status_code == 200
        assert client.head("/v1/nothing").status_code == 404
        assert client.head("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        *(
            (name, True)
            for name in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost.", "x.localhost")
        ),
        *(
            (name, False)
            for name in ("", "0.0.0.0", "::", "localhost.com", "127.0.0.1.nip.io", "10.0.0.1", "2130706433")
        ),
    ],
)
def test_names_of_this_machine(name: str, is_own: bool) -> None:
    assert is_loopback(name) == is_own


def test_pages_of_allowed_origins(model: ElasticModel) -> None:
    friend, question = "https://app.example", {"access-control-request-method": "POST"}
    with running(model, allowed_origins=(friend,), api_key=KEY) as made:
        path = f"{made.url}/v1/completions"
        asked = httpx.options(path, headers={"origin": friend, **question})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == friend
        assert "access-control-allow-origin" not in httpx.options(path, headers={"origin": EVIL, **question}).headers
        assert httpx.post(path, headers={"origin": friend}, json=GOOD).status_code == 401
        headers = {"origin": friend, "authorization": f"Bearer {KEY}"}
        answer = httpx.post(path, headers=headers, json=GOOD)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, friend)
    with running(model, allowed_origins=(friend,)) as made:
        path = f"{made.url}/v1/completions"
        assert httpx.post(path, headers={"origin": friend}, json=GOOD).status_code == 200
        assert_refused(httpx.post(path, headers={"origin": EVIL}, json=GOOD), 403)

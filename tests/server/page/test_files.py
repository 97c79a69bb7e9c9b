"""The page's files: what they may load, how large they are, and who gets them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator

import httpx
import pytest

from flextron import ElasticModel
from flextron.server.page.files import PREFIX, assets
from tests.server.running import KEY, Running, running
from tests.server.test_refusals import assert_refused

MOST_BYTES = 300_000


@pytest.fixture(scope="module")
def locked(model: ElasticModel) -> Iterator[Running]:
    """Asks for a key."""
    with running(model, api_key=KEY, slo_tpot_ms=40.0) as made:
        yield made


def test_all_files_together_are_small() -> None:
    assert sum(len(gzip.compress(asset.content)) for asset in assets().values()) <= MOST_BYTES


def test_files_refer_to_files_that_exist_and_to_no_other_host() -> None:
    for path, asset in assets().items():
        text = asset.content.decode()
        names = re.findall(r'(?:from|import) "\./([\w.]+)"', text) + re.findall(r'(?:src|href)="page/([\w.]+)"', text)
        assert all(PREFIX + name in assets() for name in names), path
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # SVG's name, which nobody fetches


def test_every_file_is_served_under_a_strict_policy_and_without_a_key(locked: Running) -> None:
    with httpx.Client(base_url=locked.url) as client:
        for path, asset in assets().items():
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.content == asset.content
            assert answer.headers["content-type"] == asset.media_type
            policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == "'none'"
            assert {policy[kind] for kind in ("script-src", "style-src", "connect-src")} == {"'self'"}
            assert "unsafe" not in answer.headers["content-security-policy"]
            again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


def test_figures_need_the_key_and_do_not_tell_it(locked: Running) -> None:
    for name in ("facts", "live"):
        assert_refused(httpx.get(f"{locked.url}{PREFIX}{name}"), 401)
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{locked.url}{PREFIX}facts", headers=headers)
    assert KEY not in answer.text
    assert answer.json()["has_key"] is True
    assert answer.json()["settings"]["slo_tpot_ms"] == 40


def test_facts_are_the_models(server: Running, model: ElasticModel) -> None:
    facts = httpx.get(f"{server.url}{PREFIX}facts").json()
    assert model.frontier is not None
    assert facts["full"] == {"spec": model.space.full.to_dict(), "params": model.num_parameters()}
    points = facts["frontier"]["points"]
    assert [p["spec"] for p in points] == [p.spec.to_dict() for p in model.frontier.points]
    assert [p["best"] for p in points] == [p in model.frontier.best() for p in model.frontier.points]
    assert facts["has_latency"] is True
    assert facts["finetuning"] is None
    json.dumps(facts, allow_nan=False)


def test_there_may_be_no_page(model: ElasticModel) -> None:
    with running(model, page=False) as made:
        for path in ("/", f"{PREFIX}main.js", f"{PREFIX}facts", f"{PREFIX}live"):
            assert_refused(httpx.get(made.url + path), 404)
        assert httpx.get(f"{made.url}/v1/models").status_code == 200


def test_only_files_of_the_page_are_served(server: Running) -> None:
    for path in (f"{PREFIX}../facts.py", f"{PREFIX}%2e%2e/facts.py", f"{PREFIX}index.html", f"{PREFIX}nothing.js"):
        assert_refused(httpx.get(server.url + path), 404)


def test_the_page_is_no_part_of_the_described_interface(server: Running) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith(PREFIX)]

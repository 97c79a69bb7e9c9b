"""Measuring from the page: what the server can do afterwards, and what it does meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from flextron import ElasticModel
from flextron.routing import device_fingerprint
from tests.server.running import Running, running, wait_until
from tests.trained import trained_model

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "The city was", "max_tokens": 4, "temperature": 0}


def model_from_elsewhere() -> ElasticModel:
    """Its latencies were measured on another device."""
    model = trained_model()
    assert model.frontier is not None
    model.frontier = replace(model.frontier, device="another machine, 96 threads")
    return model


def measure(server: Running) -> httpx.Response:
    return httpx.post(f"{server.url}/page/measure", json={}, timeout=300)


def complete(server: Running, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=COMPLETION | more, timeout=300)


def test_latencies_can_be_named_afterwards() -> None:
    model = model_from_elsewhere()
    assert model.frontier is not None
    losses = {point.spec: point.loss for point in model.frontier.points}
    with running(model) as server:
        refused = complete(server, flextron={"latency": 0.9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "flextron")
        facts = measure(server).json()
        assert (facts["missing"], facts["has_latency"]) == ([], True)
        assert facts["frontier"]["device"] == device_fingerprint(model.decoder.device, model.decoder.dtype)
        assert {point.spec: point.loss for point in model.frontier.points} == losses
        listed = [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]]
        target = min(float(name.partition("@")[2]) for name in listed if "@" in name)
        answer = complete(server, flextron={"latency": target})
        assert answer.json()["flextron"]["spec"] == model.select(latency=target).to_dict()


def test_answers_wait_and_only_one_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, may_end, has_begun = model_from_elsewhere(), threading.Event(), threading.Event()

    def profile_here() -> None:
        has_begun.set()
        may_end.wait(60)

    monkeypatch.setattr(model, "profile_here", profile_here)
    with running(model) as server:
        statuses: dict[str, int] = {}
        first = threading.Thread(target=lambda: statuses.update(measure=measure(server).status_code))
        first.start()
        wait_until(has_begun.is_set)
        asked = threading.Thread(target=lambda: statuses.update(complete=complete(server).status_code))
        asked.start()
        again = measure(server)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "measuring")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert statuses == {}
        may_end.set()
        first.join(60)
        asked.join(60)
        assert statuses == {"measure": 200, "complete": 200}


def test_a_failure_is_told_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_elsewhere()

    def profile_here() -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(model, "profile_here", profile_here)
    with running(model) as server:
        assert measure(server).status_code == 500
        assert complete(server).status_code == 200


def test_other_pages_cannot_ask_for_it() -> None:
    with running(model_from_elsewhere()) as server:
        form = httpx.post(f"{server.url}/page/measure", content="{}", headers={"content-type": "text/plain"})
        assert form.status_code == 415

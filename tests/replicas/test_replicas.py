"""Replicas on a real Ray: the same answers as one server, whatever happens to a replica."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import flextron
from flextron.cli.main import app
from flextron.errors import FlextronError
from flextron.jobs.jobs import JobsSettings
from flextron.replicas.local import deploy
from flextron.server.app import create_app
from flextron.server.startup import named_adapters
from tests.jobs.making import RECORDS, jsonl
from tests.replicas.command import Command
from tests.replicas.serving import PROMPTS, Clients, HangingReplica, Served, both_run, pids, plan_for, served
from tests.server.running import KEY, events, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("ray"),  # one Ray at a time
]
_ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0}
_CHAT = [{"role": "user", "content": "Say yes"}]


@pytest.fixture
def adapters(checkpoint: Path) -> tuple[str, ...]:
    return tuple(f"{name}={checkpoint / name}" for name in ("one", "two"))


def _asked_of_all(client: httpx.Client) -> list[dict[str, Any]]:
    """Requests of all kinds, by path and body, and what came back."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        model = ("tiny", "one", "two", "tiny@0.6")[i % 4]
        answer = client.post("/v1/completions", json=_ASKED | {"prompt": prompt, "model": model})
        found.append({"status": answer.status_code, "choices": answer.json().get("choices")})
    asked = _ASKED | {"messages": _CHAT, "flextron": {"latency": 0.5}}
    found.append(client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"])
    lines = client.post("/v1/chat/completions", json=asked | {"stream": True}).text
    found.append(
        {"text": "".join(c["delta"].get("content", "") for e in events(lines)[:-1] for c in json.loads(e)["choices"])}
    )
    found.append({"models": [m["id"] for m in client.get("/v1/models").json()["data"]]})
    for method, path, body in (
        ("POST", "/v1/completions", _ASKED | {"prompt": "a", "model": "none"}),
        ("POST", "/v1/completions", _ASKED | {"prompt": "a", "top_p": 7}),
        ("POST", "/v1/files", {}),
        ("GET", "/nothing", None),
        ("PUT", "/v1/models", None),
    ):
        answer = client.request(method, path, json=body)
        found.append({"status": answer.status_code, "error": answer.json()["error"]})
    page = client.get("/")
    found.append({"page": page.text, "policy": page.headers["content-security-policy"]})
    return found


def test_the_same_answers_as_one_server(ray_here: int, checkpoint: Path, adapters: tuple[str, ...]) -> None:
    plan = plan_for(checkpoint / "model", adapters=adapters, server={"api_key": KEY})
    model = flextron.load(checkpoint / "model")
    alone = create_app(model, plan.server, plan.engine, None, named_adapters(model, adapters))
    headers = {"authorization": f"Bearer {KEY}", "host": "localhost"}
    with TestClient(alone, headers=headers) as client:
        wanted = _asked_of_all(client)
    with served(plan) as made, made.client(headers=headers) as client:
        for _ in range(2):
            assert _asked_of_all(client) == wanted
        assert client.get("/health").json() == {"status": "ok"}
        refused = client.post("/v1/completions", json=_ASKED, headers={"authorization": "Bearer wrong"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
        foreign = client.get("/v1/models", headers={"host": "evil.example"})
        assert foreign.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.cluster
def test_streams_flow_and_end_with_their_client(ray_here: int, checkpoint: Path) -> None:
    with served(plan_for(checkpoint / "model")) as made, made.client() as client:
        asked = _ASKED | {"prompt": "The cat", "max_tokens": 100, "stream": True, "ignore_eos": True}
        times = []
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            times = [time.monotonic() for line in answer.iter_lines() if line]
        assert len(times) > 90
        # a buffered stream would come at once
        assert times[-1] - times[0] > 5 * max(b - a for a, b in pairwise(times))
        begun = time.monotonic()
        many = asked | {"n": 8}
        with client.stream("POST", "/v1/completions", json=many) as answer:
            next(answer.iter_lines())
        wait_until(lambda: _aborted(made) == 8, 20)
        assert time.monotonic() - begun < 20


def _aborted(made: Served) -> float:
    """Answers that were broken off, on both replicas."""
    found: dict[str, float] = {}
    with made.client() as client:
        for _ in range(8):
            text = client.get("/metrics").text
            created = next(line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_created"))
            mark = 'vllm:request_success_total{finished_reason="abort"'
            found[created] = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(mark))
    return sum(found.values())


def test_a_replica_killed_under_load(ray_here: int, checkpoint: Path) -> None:
    with served(plan_for(checkpoint / "model")) as made:
        with Clients(made.url) as clients:
            for _ in range(2):
                clients.wait_for(30)
                before = pids()
                killed = before.pop()
                os.kill(killed, signal.SIGKILL)
                begun = time.monotonic()
                wait_until(lambda: len(pids() - {killed}) == 2, 60)  # noqa: B023
                wait_until(both_run, 60)
                # 30 on a machine that does nothing else, which the benchmark measures
                assert time.monotonic() - begun < 60
                clients.wait_for(30)
        counts = clients.counts
        assert counts["lost"] == counts["broken"] == 0, clients.reasons[:3]
        assert counts["ended"] <= 6
        assert counts["whole"] > 100
        assert {len(texts) for texts in clients.texts.values()} == {1}


def test_an_update_under_load(ray_here: int, checkpoint: Path) -> None:
    plan = plan_for(checkpoint / "model")
    with served(plan) as made:
        before = pids()
        with Clients(made.url) as clients:
            clients.wait_for(30)
            deploy(replace(plan, server=replace(plan.server, max_tokens_limit=115), revision="2"))
            clients.wait_for(30)
        assert not before & pids()
        assert set(clients.counts) == {"whole"}, (clients.counts, clients.reasons[:3])
        with made.client() as client:
            refused = client.post("/v1/completions", json=_ASKED | {"prompt": "a", "max_tokens": 116})
            assert "at most 115" in refused.json()["error"]["message"]


@pytest.mark.cluster
def test_a_replica_whose_engine_hangs_is_replaced(ray_here: int, checkpoint: Path) -> None:
    with served(plan_for(checkpoint / "model", stall_seconds=3.0), HangingReplica) as made:
        with Clients(made.url) as clients:
            clients.wait_for(20)
            hung = made.handle.hang.remote().result()
            wait_until(lambda: hung not in pids(), 60)
            wait_until(both_run, 60)
            clients.wait_for(20)
        assert clients.counts["lost"] == clients.counts["broken"] == 0, clients.reasons[:3]


def _owner(state: Path) -> int | None:
    """The process that has the state directory."""
    for pid in pids():
        try:
            if any(file.path == str(state / "lock") for file in psutil.Process(pid).open_files()):
                return pid
        except psutil.NoSuchProcess:
            continue
    return None


def _told(client: httpx.Client, path: str) -> Iterator[str]:
    """All messages of a job."""
    after: dict[str, Any] = {}
    while True:
        page = client.get(f"{path}/events", params={"limit": 100, **after}).json()
        yield from (event["message"] for event in page["data"])
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


@pytest.mark.cluster
def test_jobs_move_with_their_state(ray_here: int, checkpoint: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    plan = plan_for(
        checkpoint / "model", state_directory=str(state), jobs=JobsSettings(save_seconds=0.0), server={"api_key": KEY}
    )
    with served(plan) as made, made.client(headers={"authorization": f"Bearer {KEY}"}) as client:
        content = jsonl(RECORDS)
        # more than goes along with a message of Ray's
        large = jsonl([{"prompt": "a", "completion": "b" * 1000}] * 3000)
        kept = client.post("/v1/files", files={"file": ("l.jsonl", large), "purpose": (None, "fine-tune")}).json()
        assert client.get(f"/v1/files/{kept['id']}/content").content == large
        form = {"file": ("train.jsonl", content), "purpose": (None, "fine-tune")}
        file = client.post("/v1/files", files=form).json()
        assert client.get(f"/v1/files/{file['id']}/content").content == content
        asked = {
            "model": "tiny",
            "training_file": file["id"],
            "suffix": "s",
            "seed": 1,
            "hyperparameters": {"n_epochs": 30, "batch_size": 1, "checkpoint_every": 5},
        }
        job = client.post("/v1/fine_tuning/jobs", json=asked).json()
        assert job["status"] in ("validating_files", "queued", "running"), job
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        wait_until(lambda: (client.get(path).json()["trained_tokens"] or 0) > 0, 60)
        owner = _owner(state)
        assert owner is not None
        os.kill(owner, signal.SIGKILL)
        wait_until(lambda: _owner(state) not in (None, owner), 60)
        wait_until(lambda: client.get(path).json()["status"] == "succeeded", 240)
        assert any("resumed after step" in message for message in _told(client, path))
        name = client.get(path).json()["fine_tuned_model"]
        wait_until(both_run, 60)
        before = _ASKED | {"prompt": "The cat", "model": name}
        for _ in range(8):
            assert name in [m["id"] for m in client.get("/v1/models").json()["data"]]
            # a prompt of its own each time, so that no replica is preferred
            assert client.post("/v1/completions", json=before).status_code == 200
        assert client.get("/page/facts").json()["finetuning"] is not None
        assert client.delete(f"/v1/models/{name}").json()["deleted"]
        for _ in range(8):
            assert client.post("/v1/completions", json=before).status_code == 404
            assert name not in [m["id"] for m in client.get("/v1/models").json()["data"]]


@pytest.mark.cluster
def test_what_cannot_start_says_why(ray_here: int, checkpoint: Path) -> None:
    with pytest.raises(FlextronError, match="is not of the form NAME=DIRECTORY"):
        deploy(plan_for(checkpoint / "model", adapters=("bad",)))


@pytest.mark.cluster
def test_behind_the_proxies_of_a_cluster(ray_here: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    from flextron.replicas.application import NAME, build

    serve.delete(NAME)
    monkeypatch.setenv("FLEXTRON_API_KEY", KEY)
    engine = {"kv_cache_gb": 0.005, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    args = {"model": str(checkpoint / "model"), "num_cpus": 1, "engine": engine, "server": {"name": "tiny"}}
    serve.run(build(args), name=NAME, route_prefix="/")
    try:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{ray_here}", headers=headers, timeout=60) as client:
            whole = client.post("/v1/completions", json=_ASKED | {"prompt": "The cat"}).json()["choices"][0]["text"]
            times, lines = [], []
            asked = _ASKED | {"prompt": "The cat", "stream": True}
            with client.stream("POST", "/v1/completions", json=asked) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        lines.append(json.loads(line.removeprefix("data: ")))
                        times.append(time.monotonic())
            assert "".join(line["choices"][0]["text"] for line in lines) == whole
            assert times[-1] - times[0] > 2 * max(b - a for a, b in pairwise(times))
            refused = client.get("/v1/models", headers={"authorization": "Bearer wrong"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert client.get("/nothing").status_code == 404
            assert "flextron" in client.get("/").text
    finally:
        serve.delete(NAME)


@pytest.mark.cluster
def test_narrowed_requests_start_another_replica(ray_here: int, checkpoint: Path) -> None:
    from ray import serve

    objectives = {"slo_tpot_ms": 0.001, "min_latency_target": 0.5}
    plan = plan_for(checkpoint / "model", replicas=1, max_replicas=2, server=objectives)
    # replicas that are there already would stay for a while
    serve.delete("flextron")
    with served(plan) as made:
        assert len(pids()) == 1
        with Clients(made.url, num_clients=1) as clients:
            # one client alone is no queue
            wait_until(lambda: len(pids()) == 2, 150)
            clients.wait_for(5)
        assert clients.counts["lost"] == 0


@pytest.mark.cluster
def test_on_a_cluster_that_is_there(ray_here: int, checkpoint: Path) -> None:
    import ray

    sizes = ["--kv-cache-gb", "0.005", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
    address = ray.get_runtime_context().gcs_address
    command = Command(str(checkpoint / "model"), "--replicas", "2", "--name", "tiny", "--ray-address", address, *sizes)
    try:
        with httpx.Client(base_url=command.url(), timeout=60) as client:
            answer = client.post("/v1/completions", json=_ASKED | {"prompt": "The cat"})
            assert answer.json()["usage"]["completion_tokens"] == 20
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(60) == 0
        assert pids() == set()
    finally:
        command.process.kill()


@pytest.mark.cluster
def test_no_cluster_at_an_address() -> None:
    result = CliRunner().invoke(app, ["serve", "tiny", "--replicas", "2", "--port", "0", "--ray-address", "no:such"])
    assert result.exit_code == 2
    assert "check --ray-address" in " ".join(result.stderr.split())

"""Clients that leave, an engine that dies, a server that is told to stop."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flextron import ElasticModel
from tests.server.running import Running, events, running, wait_until

LONG: dict[str, Any] = {"model": "tiny", "prompt": "The city was", "max_tokens": 120, "temperature": 0}


@pytest.fixture
def slow(model: ElasticModel) -> Iterator[Running]:
    """A server on which an answer of 120 tokens takes some seconds."""
    with running(model) as made:
        made.slow_down(0.02)
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_request(slow: Running, stream: bool, n: int) -> None:
    core = slow.service.core
    body = json.dumps(LONG | {"stream": stream, "n": n, "temperature": 1}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2]))) as sock:
        sock.sendall(head.encode() + body)
        wait_until(lambda: len(core.scheduler.running) == n and core.pool.num_used > 0)
    left = time.monotonic()
    slow.wait_until_idle()
    assert time.monotonic() - left < 1.5
    assert 'request_success_total{finished_reason="abort",model_name="tiny"}' in httpx.get(f"{slow.url}/metrics").text


def test_clients_that_leave_at_any_moment(slow: Running) -> None:
    async def leave(client: httpx.AsyncClient, seconds: float, stream: bool) -> None:
        try:
            await asyncio.wait_for(client.post("/v1/completions", json=LONG | {"stream": stream}), seconds)
        except (TimeoutError, asyncio.TimeoutError, httpx.HTTPError):
            return

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=slow.url, timeout=30) as client:
            await asyncio.gather(*(leave(client, 0.004 * i, i % 2 == 0) for i in range(30)))

    asyncio.run(all_of_them())
    slow.wait_until_idle()
    assert slow.service.room(4, slow.service.catalog.choose("tiny")) == 124
    assert slow.client().completions.create(**LONG | {"max_tokens": 2}).choices


def test_an_engine_that_dies_says_so(slow: Running) -> None:
    client = slow.client()
    stream = client.completions.create(**LONG, stream=True)
    next(stream)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            client.completions.create(**LONG)
        except openai.InternalServerError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: len(slow.service.core.scheduler.running) == 2)

    def broken() -> None:
        raise RuntimeError("a chip fell out")

    slow.service.core.step = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(openai.APIError, match="the engine has stopped"):
        list(stream)
    waiting.join(20)
    assert "the engine has stopped" in str(errors[0])
    wait_until(lambda: not slow.service.worker.is_alive())
    assert httpx.get(f"{slow.url}/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
        client.completions.create(**LONG)
    assert httpx.get(f"{slow.url}/metrics").status_code == 200


def test_an_unexpected_error_is_told_and_hidden(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(slow.service.catalog, "choose", broken)
    answer = httpx.post(f"{slow.url}/v1/completions", json=LONG)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert len(answer.headers["x-request-id"]) == 32


SCRIPT = """
import sys, time
from flextron.engine import EngineCore
step = EngineCore.step
seconds = float(sys.argv[1])
EngineCore.step = lambda self: time.sleep(seconds) or step(self)
from flextron.cli.main import main
sys.argv = ["flextron", "serve", *sys.argv[2:]]
main()
"""


@pytest.fixture(scope="module")
def checkpoint(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny"
    model.save(path)
    return path


@contextmanager
def process(checkpoint: Path, *options: str, step: float = 0.02) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`flextron serve` with slow steps; gives the process and its address."""
    sizes = ["--port", "0", "--kv-cache-gb", "0.005"]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(step), str(checkpoint), *sizes, *options], stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        try:
            line = next(line for line in child.stderr if line.startswith("serving tiny at "))
            yield child, line.split()[3].removesuffix("/v1")
        finally:
            child.kill()


def test_a_signal_lets_running_answers_end(checkpoint: Path) -> None:
    with process(checkpoint, "--drain-seconds", "30") as (child, url), httpx.Client(base_url=url, timeout=30) as client:
        whole = client.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            child.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["retry-after"]
            told = events("\n".join([first, *lines]))
        assert told[-1] == "[DONE]"
        assert "".join(json.loads(t)["choices"][0]["text"] for t in told[:-1]) == whole
        assert child.wait(15) == 0


def test_the_time_for_that_is_limited(checkpoint: Path) -> None:
    with (
        process(checkpoint, "--drain-seconds", "0.3") as (child, url),
        httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=30) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        child.send_signal(signal.SIGTERM)
        told = events("\n".join(lines))
        assert json.loads(told[-1])["error"]["code"] == "shutting_down"
        assert child.wait(15) == 0


def test_a_second_signal_ends_it_at_once(checkpoint: Path) -> None:
    with (
        process(checkpoint, step=0.1) as (child, url),
        httpx.Client(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream,
    ):
        next(stream.iter_lines())
        child.send_signal(signal.SIGINT)
        wait_until(lambda: client.get("/health").status_code == 503)
        asked = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 128 + signal.SIGINT
        assert time.monotonic() - asked < 1

"""The ingress in front of real applications in this process, some of which die."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.types import Message

from flextron.engine import EngineSettings
from flextron.replicas.forwarding import ELSEWHERE, Forwarded, answers
from flextron.replicas.ingress import Ingress
from flextron.server.app import create_app
from flextron.serving.settings import ServerSettings
from tests.jobs.making import CHAT_TEMPLATE
from tests.server.running import events
from tests.trained import trained_model

SETTINGS = ServerSettings(name="tiny", allowed_hosts=None, max_body_mb=0.01)
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "temperature": 0, "ignore_eos": True}
CHAT = [{"role": "user", "content": "Say yes"}]


class GoneError(Exception):
    """A replica's end."""


class Answer:
    """What a handle of Serve gives: lists of messages, and a way to cancel."""

    def __init__(self, messages: AsyncIterator[list[Message]]) -> None:
        self._messages, self.was_cancelled = messages, False

    async def __anext__(self) -> list[Message]:
        return await self._messages.__anext__()

    def cancel(self) -> None:
        self.was_cancelled = True


class Replicas:
    """One server; its lives end as `ends` says: after so many lists of messages, or never (None)."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.ends: list[int | str | None] = []
        self.asked: list[Forwarded] = []
        self.given: list[Answer] = []

    def give(self, asked: Forwarded) -> Answer:
        self.asked.append(asked)
        self.given.append(Answer(self._answered(asked, self.ends.pop(0) if self.ends else None)))
        return self.given[-1]

    async def _answered(self, asked: Forwarded, end: int | str | None) -> AsyncIterator[list[Message]]:
        yield []
        if end == ELSEWHERE:
            yield [{"type": ELSEWHERE}]
            return
        count = 0
        async for messages in answers(self._app, asked):
            for message in messages:
                if count == end:
                    raise GoneError
                yield [message]
                count += 1


@pytest.fixture(scope="module")
def model() -> Any:
    made = trained_model()
    assert made.tokenizer is not None
    made.tokenizer.chat_template = CHAT_TEMPLATE
    return made


@contextmanager
def in_front(model: Any) -> Iterator[tuple[Any, Replicas]]:
    """A function that runs a coroutine with a client, and what the client's requests reach."""
    loop = asyncio.new_event_loop()
    engine = EngineSettings(kv_cache_gb=0.005, max_num_seqs=8, max_num_batched_tokens=64)
    app = create_app(model, SETTINGS, engine)
    replicas = Replicas(app)

    async def start() -> None:
        app.state.service.start()

    loop.run_until_complete(start())
    ingress = Ingress(replicas.give, SETTINGS, (GoneError,), has_jobs=True)

    async def ask(method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(ingress, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    try:
        yield (lambda *a, **options: loop.run_until_complete(ask(*a, **options))), replicas
    finally:
        loop.run_until_complete(app.state.service.stop())
        loop.close()


@pytest.fixture(scope="module")
def front(model: Any) -> Iterator[tuple[Any, Replicas]]:
    with in_front(model) as made:
        yield made


@pytest.fixture(autouse=True)
def _forget(front: tuple[Any, Replicas]) -> None:
    replicas = front[1]
    replicas.ends, replicas.asked, replicas.given = [], [], []


@pytest.mark.parametrize("end", [0, 1, ELSEWHERE])
@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_has_seen_is_asked_again(front: tuple[Any, Replicas], end: int | str, stream: bool) -> None:
    ask, replicas = front
    body = ASKED | {"prompt": "The cat", "stream": stream}
    whole = ask("POST", "/v1/completions", json=body)
    replicas.ends = [end, end]
    again = ask("POST", "/v1/completions", json=body)
    assert again.status_code == 200
    assert len(replicas.asked) == 4
    assert _text(again, stream) == _text(whole, stream)
    assert again.headers["x-request-id"].encode() in dict(replicas.asked[-1].scope["headers"]).values()
    assert all(answer.was_cancelled for answer in replicas.given)


def _text(answer: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    return "".join(json.loads(event)["choices"][0]["text"] for event in events(answer.text)[:-1])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "The cat"}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/messages", {"messages": CHAT}),
        ("/v1/responses", {"input": "Say yes", "max_output_tokens": 20}),
    ],
)
def test_a_stream_that_had_begun_ends_with_an_error(
    front: tuple[Any, Replicas], path: str, body: dict[str, Any]
) -> None:
    ask, replicas = front
    replicas.ends = [4]
    asked = {"model": "tiny", "stream": True, "max_tokens": 20} | body
    if path == "/v1/responses":
        del asked["max_tokens"]
    answer = ask("POST", path, json=asked)
    assert (answer.status_code, len(replicas.asked)) == (200, 1)
    *before, last = events(answer.text)
    assert len(before) == 3
    told = json.loads(last)
    if path == "/v1/messages":
        assert (told["type"], told["error"]["type"]) == ("error", "api_error")
    elif path == "/v1/responses":
        assert (told["type"], told["code"]) == ("error", "replica_died")
    else:
        assert told["error"]["code"] == "replica_died"
    assert answer.text.endswith("\n\n")


def test_what_kills_every_replica_is_given_up(front: tuple[Any, Replicas]) -> None:
    ask, replicas = front
    replicas.ends = [0] * 9
    answer = ask("POST", "/v1/completions", json=ASKED | {"prompt": "The cat"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert len(replicas.asked) == 5


def test_a_change_is_never_made_twice(front: tuple[Any, Replicas]) -> None:
    ask, replicas = front
    replicas.ends = [0, None]
    answer = ask("POST", "/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": "x"})
    assert (answer.status_code, len(replicas.asked)) == (503, 1)
    assert "may or may not" in answer.json()["error"]["message"]
    replicas.ends = [0, None]
    assert ask("GET", "/v1/fine_tuning/jobs").status_code == 404
    assert len(replicas.asked) == 3


def test_limits_hold_before_a_replica_is_asked(front: tuple[Any, Replicas]) -> None:
    ask, replicas = front
    assert ask("POST", "/v1/completions", json={"prompt": "x" * 20_000}).status_code == 413
    refused = ask("POST", "/v1/completions", json=ASKED, headers={"origin": "https://evil.example"})
    assert refused.json()["error"]["code"] == "origin_not_allowed"
    assert ask("POST", "/page/measure", json={}).status_code == 400
    assert replicas.asked == []


def test_a_client_that_leaves_is_not_answered(model: Any) -> None:
    with in_front(model) as (_, replicas):
        ingress = Ingress(replicas.give, SETTINGS, (GoneError,), has_jobs=False)
        body = json.dumps(ASKED | {"prompt": "The cat", "max_tokens": 100, "stream": True}).encode()
        sent: list[Message] = []

        async def leave() -> None:
            to_come = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> Message:
                if to_come:
                    return to_come.pop()
                while len(sent) < 3:
                    await asyncio.sleep(0.001)
                return {"type": "http.disconnect"}

            async def send(message: Message) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
            scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "asgi": {"version": "3.0"}}
            scope |= {"headers": [(b"content-type", b"application/json")], "client": None, "server": None}
            await asyncio.wait_for(ingress(scope, receive, send), 10)

        service = replicas._app.state.service
        service._loop.run_until_complete(leave())
        assert replicas.given[0].was_cancelled
        assert len(sent) < 50


def test_draining(front: tuple[Any, Replicas]) -> None:
    _, replicas = front

    async def drain() -> tuple[int, int]:
        ingress = Ingress(replicas.give, SETTINGS, (GoneError,), has_jobs=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(ingress), base_url="http://localhost") as client:
            body = ASKED | {"prompt": "The cat", "max_tokens": 60}
            running = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while not replicas.asked:
                await asyncio.sleep(0.001)
            await ingress.drain()
            assert running.done()
            return (await running).status_code, (await client.post("/v1/completions", json=body)).status_code

    assert replicas._app.state.service._loop.run_until_complete(drain()) == (200, 503)

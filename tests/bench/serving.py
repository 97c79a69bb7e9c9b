"""A tiny streaming server that speaks as much HTTP as the client needs, and emits text at known times.

It is written against sockets, not with a framework, so that it can break off in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"

Behaviour = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request as the server sees it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    number: int
    """In order of arrival."""

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def event(self, data: Any) -> None:
        await self.write(
            b"data: " + (data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()) + b"\n\n"
        )

    def chunk(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        chat = "chat" in self.path
        piece = {"delta": {"content": text}} if chat else {"text": text}
        return {"choices": [{"index": 0, "finish_reason": finish_reason, **piece}]}

    async def refuse(self, status: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        await self.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


def answering(
    *, first_s: float = 0.0, gap_s: float = 0.0, num_tokens: int | None = None, usage: bool = True, tokens: int = 1
) -> Behaviour:
    """An answer of the wanted length, the first text after `first_s`, `tokens` tokens in each piece."""

    async def answer(exchange: Exchange) -> None:
        count = exchange.body["max_tokens"] if num_tokens is None else num_tokens
        await exchange.write(HEAD)
        if "chat" in exchange.path:
            await exchange.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(first_s)
        for i in range(0, count, tokens):
            if i:
                await asyncio.sleep(gap_s)
            await exchange.event(exchange.chunk(" \u2028word", "length" if i + tokens >= count else None))
        if usage and exchange.body["stream_options"]["include_usage"]:
            prompt = exchange.body.get("prompt") or exchange.body["messages"][0]["content"]
            counted = {"prompt_tokens": len(prompt.split()) + 1, "completion_tokens": count}
            await exchange.event({"choices": [], "usage": counted})
        await exchange.event(b"[DONE]")

    return answer


@dataclass
class Served:
    """A running server."""

    url: str
    exchanges: list[Exchange] = field(default_factory=list)
    """All requests so far."""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [exchange.body for exchange in self.exchanges]


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
    request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    return Exchange(path=request.split()[1], headers=headers, body=body, writer=writer, number=-1)


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Served]:
    """A server in a thread of its own; it answers every request as `behaviour` does."""
    loop = asyncio.new_event_loop()
    served = Served(url="")
    under_way: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        under_way.add(task)
        try:
            exchange = await _exchange(reader, writer)
            exchange.number = len(served.exchanges)
            served.exchanges.append(exchange)
            await behaviour(exchange)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()
            under_way.discard(task)

    async def shut(server: asyncio.Server) -> None:
        server.close()
        for task in list(under_way):
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await asyncio.sleep(0)

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0))
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(shut(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()

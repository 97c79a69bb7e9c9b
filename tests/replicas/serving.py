"""Replicas on a real Ray on this machine, their address, and clients that never rest."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import uvicorn

from flextron.engine import EngineSettings
from flextron.replicas.local import deploy
from flextron.replicas.plan import Plan
from flextron.replicas.replica import Replica
from flextron.server.run import listen, server_config
from flextron.serving.settings import ServerSettings
from tests.server.running import wait_until

__all__ = ["PROMPTS", "Clients", "HangingReplica", "Served", "both_run", "pids", "plan_for", "served"]

PROMPTS = [f"{who} {what}" for who in ("The cat", "A man", "It", "All of them") for what in ("is", "was not", "of the")]
_PROCESS = "ray::ServeReplica:flextron:Replica"


def plan_for(directory: Any, **more: Any) -> Plan:
    """Small and fast: answers take some tenths of a second."""
    server = {"name": "tiny", "drain_seconds": 10.0} | more.pop("server", {})
    engine = EngineSettings(kv_cache_gb=0.005, max_num_seqs=8, max_num_batched_tokens=64)
    return Plan(
        directory=str(directory),
        server=ServerSettings(**server),
        engine=engine,
        num_cpus=1,
        **more,
    )


def both_run() -> bool:
    """Whether Serve holds two replicas for healthy."""
    from ray import serve

    found = serve.status().applications["flextron"].deployments["Replica"]
    return found.status.value == "HEALTHY" and found.replica_states.get("RUNNING", 0) == 2


def pids() -> set[int]:
    """Processes of replicas."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][0].startswith(_PROCESS):
            found.add(process.pid)
    return found


class HangingReplica(Replica):
    """One whose engine can be made to hang, while its process lives."""

    def hang(self) -> int:
        self._service.core.step = lambda: time.sleep(1e6)  # type: ignore[assignment, method-assign, return-value]
        return os.getpid()


@dataclass(frozen=True)
class Served:
    """Where the ingress listens, and the handle behind it."""

    url: str
    handle: Any

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)


@contextmanager
def served(plan: Plan, kind: type | None = None) -> Iterator[Served]:
    """Serve a plan on the Ray that is there; replicas of another plan are replaced."""
    from flextron.replicas.application import ingress_of

    handle = deploy(plan, kind)
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(ingress_of(handle, plan), plan.server.client_seconds))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", handle)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@dataclass
class Clients:
    """Clients that ask again soon after they are answered, half of them for streams, and count what they get.

    `whole` answers; `lost` ones, of which nothing came; streams that had begun and ended with an error as their last
    event (`ended`), or without one (`broken`).
    """

    url: str
    num_clients: int = 6
    pause: float = 0.1
    """Seconds between an answer and the next request: a busy client would take the cores from a replica that starts."""
    counts: Counter[str] = field(default_factory=Counter)
    texts: dict[str, set[str]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._is_ending = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_ending = True
        self._thread.join(130)
        assert not self._thread.is_alive()

    def wait_for(self, more: int) -> float:
        """Wait until so many more answers are whole; how long that took."""
        begun, enough = time.monotonic(), self.counts["whole"] + more
        wait_until(lambda: self.counts["whole"] >= enough, 120)
        return time.monotonic() - begun

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self.num_clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._ask_on(client, random.Random(i), i % 2 == 0) for i in range(self.num_clients)))

    async def _ask_on(self, client: httpx.AsyncClient, rng: random.Random, is_stream: bool) -> None:
        while not self._is_ending:
            prompt = rng.choice(PROMPTS)
            asked = {"prompt": prompt, "max_tokens": 110, "temperature": 0, "ignore_eos": True, "model": "tiny"}
            found = await (self._stream(client, asked) if is_stream else self._whole(client, asked))
            self.counts[found] += 1
            await asyncio.sleep(self.pause)

    async def _whole(self, client: httpx.AsyncClient, asked: dict[str, Any]) -> str:
        try:
            answer = await client.post("/v1/completions", json=asked)
        except httpx.HTTPError as error:
            self.reasons.append(repr(error))
            return "lost"
        if answer.status_code != 200:
            self.reasons.append(f"{answer.status_code} {answer.text}")
            return "lost"
        self.texts.setdefault(asked["prompt"], set()).add(answer.json()["choices"][0]["text"])
        return "whole"

    async def _stream(self, client: httpx.AsyncClient, asked: dict[str, Any]) -> str:
        text, last = "", None
        try:
            async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
                if answer.status_code != 200:
                    self.reasons.append(f"{answer.status_code} {(await answer.aread()).decode()}")
                    return "lost"
                async for line in answer.aiter_lines():
                    if not line:
                        continue
                    last = line.removeprefix("data: ")
                    if last == "[DONE]":
                        self.texts.setdefault(asked["prompt"], set()).add(text)
                        return "whole"
                    chunk = json.loads(last)
                    if "error" in chunk:
                        return "ended"
                    text += "".join(choice["text"] for choice in chunk["choices"])
        except httpx.HTTPError as error:
            self.reasons.append(repr(error))
        return "lost" if last is None else "broken"

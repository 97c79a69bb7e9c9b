"""A real server on a free port, in a thread of the test."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from flextron import ElasticModel
from flextron.engine import EngineSettings
from flextron.jobs.jobs import Jobs
from flextron.server.app import create_app
from flextron.server.run import server_config
from flextron.serving.adapters import AdapterNames
from flextron.serving.service import Service
from flextron.serving.settings import ServerSettings
from tests.trained import trained_model

__all__ = ["KEY", "SHORT_TEMPLATE", "Running", "events", "running", "running_chat", "wait_until"]

KEY = "a-key"
SHORT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% for c in m.tool_calls or [] %}{{ c.function.name }} {% endfor %}"
    "{% endfor %}{% if tools %}{% endif %}:"
)
"""It is made for tools, and short: the model has few positions."""


@dataclass(frozen=True)
class Running:
    """Where it listens, and what runs behind it."""

    url: str
    service: Service
    app: FastAPI
    clients: list[OpenAI] = field(default_factory=list)

    def client(self, **options: Any) -> OpenAI:
        """OpenAI's own client; it is closed with the server."""
        client = OpenAI(**{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, **options})
        self.clients.append(client)
        return client

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio; to be closed by its user."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def slow_down(self, seconds: float) -> None:
        """Let every step of the engine take so much longer."""
        step = self.service.core.step

        def slowed() -> Any:
            time.sleep(seconds)
            return step()

        self.service.core.step = slowed  # type: ignore[method-assign]

    def wait_until_idle(self) -> None:
        """Until nothing runs and nothing is held; fails if that does not come."""
        core = self.service.core
        wait_until(lambda: not core.has_unfinished and core.pool.num_used == 0)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait; fail if it takes so long that it will not come, on a machine that may be busy with other things."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def running(
    model: ElasticModel,
    engine: dict[str, Any] | None = None,
    jobs: Jobs | None = None,
    adapters: AdapterNames | None = None,
    port: int = 0,
    **settings: Any,
) -> Iterator[Running]:
    """Serve a model under the name `tiny`; port 0 is a free one."""
    sizes = {"kv_cache_gb": 0.005, "max_num_seqs": 8, "max_num_batched_tokens": 64} | (engine or {})
    app = create_app(model, ServerSettings(**{"name": "tiny", **settings}), EngineSettings(**sizes), jobs, adapters)
    sock = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(server_config(app, app.state.service.settings.client_seconds))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    made = Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app.state.service, app)
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def running_chat(template: str, **settings: Any) -> Iterator[Running]:
    """Serve a trained model with a chat template."""
    model = trained_model()
    assert model.tokenizer is not None
    model.tokenizer.chat_template = template
    with running(model, **settings) as made:
        yield made


def events(text: str) -> list[str]:
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]

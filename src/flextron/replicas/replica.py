"""One replica: a server without a socket, whose requests come from the ingress."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from starlette.types import ASGIApp, Message

from flextron.errors import FlextronError
from flextron.jobs.jobs import Jobs
from flextron.replicas.forwarding import ELSEWHERE, Forwarded, answers
from flextron.replicas.ownership import SharedAdapters, own
from flextron.replicas.plan import Plan
from flextron.replicas.routes import JOBS
from flextron.server.app import app_of
from flextron.server.http import answer_error
from flextron.server.page.files import PREFIX
from flextron.server.startup import missing_measurements, named_adapters
from flextron.serving.errors import ApiError
from flextron.serving.service import Service

__all__ = ["HungError", "Replica"]

_log = logging.getLogger("flextron.server")
_LOOK_SECONDS = 0.5
"""Between two looks whether the state directory is free, for a replica without requests; more with each request."""


class HungError(FlextronError):
    """The replica lives, but its engine does not work."""


class Replica:
    """What Ray Serve makes once a process, and asks for answers and for its health."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        """Load the model and start the engine.

        Raises:
            FlextronError: the plan cannot be followed.
        """
        self._plan = plan
        directory = None if plan.state_directory is None else Path(plan.state_directory).expanduser()
        self._model, engine = await asyncio.to_thread(plan.load)
        self._adapters = SharedAdapters(directory)
        named_adapters(self._model, plan.adapters, into=self._adapters)
        self._service = Service(self._model, plan.server, engine, self._adapters)
        self._service.start()
        self._app: ASGIApp = app_of(self._model, self._service)
        self._jobs: Jobs | None = None
        self._refusal: FlextronError | None = None
        """Why this replica cannot own the jobs."""
        self._seen, self._seen_at = self._service.progress, time.monotonic()
        self._owning = None if directory is None else asyncio.ensure_future(self._own_when_free())

    async def _own_when_free(self) -> None:
        while self._jobs is None:
            try:
                self._jobs = await asyncio.to_thread(own, self._plan, self._model)
            except FlextronError as error:
                self._refusal = error
                _log.error("finetuning is not possible: %s", error)
                return
            if self._jobs is None:
                # one that has much to do leaves the jobs to others
                await asyncio.sleep(_LOOK_SECONDS * (1 + min(self._load(), 20)))
        self._service.attach(self._jobs)
        self._app = app_of(self._model, self._service, self._jobs)

    def _load(self) -> int:
        load = self._service.worker.load
        return load.num_running + load.num_waiting

    async def answer(self, asked: Forwarded) -> AsyncIterator[list[Message]]:
        """The answer's ASGI messages; the first list is empty and says that the request is here."""
        yield []
        app = self._app
        if asked.wanted.kind == JOBS and self._jobs is None:
            if self._refusal is None:
                yield [{"type": ELSEWHERE}]
                return
            path = asked.scope["path"]
            if not path.startswith(PREFIX):
                refusal = ApiError(503, str(self._refusal), kind="server_error", code="no_finetuning")
                app = answer_error(refusal, path)
        is_first = True
        async for messages in answers(app, asked):
            failed = is_first and messages[0].get("status", 0) >= 500 and not self._service.is_healthy
            if failed:
                yield [{"type": ELSEWHERE}]
                return
            is_first = False
            yield messages

    def complaints(self) -> list[str]:
        """What the operator should know of the model, one sentence each."""
        said = self._model.generation_defaults.complaint
        told = [] if said is None else [said]
        if missing_measurements(self._model):
            told.append(
                f"a replica runs on {torch.get_num_threads()} threads, on which the model was not measured, so "
                "requests cannot name latencies; run flextron profile with OMP_NUM_THREADS set to that before"
            )
        return told

    def check_health(self) -> None:
        """Be replaced where requests would hang.

        Raises:
            HungError: the engine has ended, or takes no step although there is work.
        """
        if not self._service.worker.is_alive():
            raise HungError("the engine has stopped")
        now, progress = time.monotonic(), self._service.progress
        if progress is None or progress != self._seen:
            self._seen, self._seen_at = progress, now
        elif now - self._seen_at > self._plan.stall_seconds:
            raise HungError(f"the engine has taken no step for {now - self._seen_at:.0f} s, although there is work")

    def record_routing_stats(self) -> dict[str, Any]:
        """What `routes.State` needs."""
        return {
            "load": self._load(),
            "adapters": self._service.adapters.names,
            "owns_jobs": self._jobs is not None or self._refusal is not None,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How narrow requests have to be now; 1 is not at all."""
        return {"latency_cap": self._service.cap}

    async def __del__(self) -> None:
        """End in order; Serve awaits it when no request runs any more."""
        if self._owning is not None:
            self._owning.cancel()
        await self._service.stop()
        if self._jobs is not None:
            await asyncio.to_thread(self._jobs.close)
        self._service.core.close()

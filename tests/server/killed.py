"""A server in a process of its own, to be killed at any moment, and a client that remembers what it was told."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI

from flextron.jobs.records import JobCheckpoint
from tests.finetuning.bigram import is_whole
from tests.jobs.making import jsonl
from tests.server.running import KEY
from tests.server.tuning import chat_model, tuning
from tests.trained import trained_model

__all__ = ["Books", "Child"]

_context = multiprocessing.get_context("forkserver")
# the imports take longer than all the rest
_context.set_forkserver_preload(["tests.server.killed", "transformers.models.llama.configuration_llama"])
_MOST_LIVE = 6


def _serve(state: Path, ready: Connection) -> None:
    seen = state.parent / "hook.log"

    def on_adapter(checkpoint: JobCheckpoint, directory: Path) -> None:
        with seen.open("a") as log:
            log.write(f"{checkpoint.name} {is_whole(directory, checkpoint.step)}\n")

    with tuning(chat_model(trained_model()), state, 0.003, on_adapter=on_adapter) as made:
        ready.send(made.server.url)
        threading.Event().wait()


class Child:
    """One life of the server."""

    def __init__(self, state: Path) -> None:
        """Start it."""
        self._ready, theirs = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_serve, args=(state, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def client(self) -> OpenAI:
        """Once it serves; to be closed."""
        return OpenAI(base_url=f"{self._ready.recv()}/v1", api_key=KEY, max_retries=0, timeout=20)

    def kill(self) -> None:
        """At once, without a word."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)

    def join(self) -> None:
        """Until it is gone."""
        self._process.join(20)
        assert not self._process.is_alive()
        self._ready.close()


@dataclass
class Books:
    """All that the server has acknowledged, and a client that goes on asking for more."""

    rng: random.Random
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    """Ids, and their files'."""
    statuses: dict[str, str] = field(default_factory=dict)
    """Of jobs, where nothing but the client may change them."""
    tokens: dict[str, int] = field(default_factory=dict)
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, Any] = field(default_factory=dict)
    num_suffixes: int = 0

    def use(self, client: OpenAI) -> None:
        """Ask for random things until the server is gone."""
        actions = [self._upload, self._create, self._pause, self._resume, self._cancel, self._look, self._look]
        try:
            while True:
                self.rng.choice(actions)(client)
        except openai.APIConnectionError:
            pass

    def check(self, client: OpenAI) -> None:
        """Nothing of it is lost."""
        assert {file.id for file in client.files.list()} >= self.files.keys()
        for file_id, content in self.files.items():
            assert client.files.content(file_id).content == content
        for job_id, file_id in self.jobs.items():
            job = client.fine_tuning.jobs.retrieve(job_id)
            assert job.training_file == file_id
            assert job.status == self.statuses.get(job_id, job.status)
            assert (job.trained_tokens or 0) >= self.tokens.get(job_id, 0)
            events = {event.id: event for event in client.fine_tuning.jobs.list_events(job_id, limit=100)}
            seen = self.events.get(job_id, {})
            assert {key: events.get(key) for key in seen} == seen
            steps = [event.data["step"] for event in events.values() if event.type == "metrics"]  # type: ignore[index]
            assert steps == list(range(len(steps), 0, -1))
            names = {c.fine_tuned_model_checkpoint for c in client.fine_tuning.jobs.checkpoints.list(job_id, limit=100)}
            assert names >= self.checkpoints.get(job_id, set())

    def _upload(self, client: OpenAI) -> None:
        if len(self.files) < 10:
            numbers = [self.rng.randrange(50) for _ in range(self.rng.randint(4, 40))]
            content = jsonl({"prompt": f"{n} and ", "completion": str(n + 1)} for n in numbers)
            made = client.files.create(file=("numbers.jsonl", content), purpose="fine-tune")
            self.files[made.id] = content

    def _create(self, client: OpenAI) -> None:
        live = len(self.jobs) - sum(status != "paused" for status in self.statuses.values())
        if not self.files or live >= _MOST_LIVE:
            return
        file_id = self.rng.choice(list(self.files))
        self.num_suffixes += 1
        chosen: Any = {
            "n_epochs": self.rng.randint(1, 3),
            "batch_size": self.rng.randint(1, 4),
            "checkpoint_every": self.rng.randint(1, 3),
        }
        suffix = f"s{self.num_suffixes}"
        options: Any = {"suffix": suffix, "seed": self.rng.randrange(100), "hyperparameters": chosen}
        if self.rng.random() < 0.5:
            options["validation_file"] = self.rng.choice(list(self.files))
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, **options)
        self.jobs[job.id] = file_id

    def _change(self, job_id: str, change: Callable[[str], Any]) -> str | None:
        # until it has answered, anything may be true
        self.statuses.pop(job_id, None)
        try:
            return str(change(job_id).status)
        except openai.BadRequestError:
            return None

    def _pause(self, client: OpenAI) -> None:
        going = [job_id for job_id in self.jobs if job_id not in self.statuses]
        if going and self._change(job_id := self.rng.choice(going), client.fine_tuning.jobs.pause) is not None:
            self.statuses[job_id] = "paused"

    def _resume(self, client: OpenAI) -> None:
        paused = [job_id for job_id, status in self.statuses.items() if status == "paused"]
        if paused:
            assert self._change(self.rng.choice(paused), client.fine_tuning.jobs.resume) == "queued"

    def _cancel(self, client: OpenAI) -> None:
        going = [job_id for job_id in self.jobs if job_id not in self.statuses]
        if going and self.rng.random() < 0.1:
            job_id = self.rng.choice(going)
            if self._change(job_id, client.fine_tuning.jobs.cancel) is not None:
                self.statuses[job_id] = "cancelled"

    def _look(self, client: OpenAI) -> None:
        if not self.jobs:
            return
        job = client.fine_tuning.jobs.retrieve(job_id := self.rng.choice(list(self.jobs)))
        assert job.status != "failed", job.error
        if job.status in ("succeeded", "cancelled"):
            self.statuses[job_id] = job.status
        self.tokens[job_id] = job.trained_tokens or 0
        for event in client.fine_tuning.jobs.list_events(job_id, limit=10).data:
            self.events.setdefault(job_id, {})[event.id] = event
        found = client.fine_tuning.jobs.checkpoints.list(job_id, limit=100).data
        self.checkpoints.setdefault(job_id, set()).update(c.fine_tuned_model_checkpoint for c in found)

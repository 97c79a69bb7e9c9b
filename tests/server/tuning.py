"""A live server that finetunes, for OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from flextron import ElasticModel
from flextron.finetuning.trainer import MakeTrainer
from flextron.jobs.jobs import Jobs, OnAdapter
from flextron.jobs.records import JobCheckpoint
from flextron.serving.adapters import AdapterNames
from tests.finetuning.bigram import BigramMaker
from tests.jobs.making import CHAT_TEMPLATE, RECORDS, jsonl, new_jobs
from tests.server.running import Running, running, wait_until

__all__ = ["CHAT", "Tuning", "chat_model", "tuning"]

CHAT = [
    {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("yes", "no", "maybe", "never", "always")
]


@dataclass(frozen=True)
class Tuning:
    """The server and what runs behind it."""

    server: Running
    jobs: Jobs
    maker: MakeTrainer
    adapters: list[tuple[JobCheckpoint, Path]] = field(default_factory=list)
    """What the hook was told."""

    def client(self, **options: Any) -> OpenAI:
        return self.server.client(**options)

    def upload(self, client: OpenAI, records: Any = RECORDS) -> str:
        return client.files.create(file=("train.jsonl", jsonl(records)), purpose="fine-tune").id

    def wait(self, client: OpenAI, job_id: str, *statuses: str) -> Any:
        """The job, once it has one of these."""
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in statuses, 120)
        return client.fine_tuning.jobs.retrieve(job_id)


def chat_model(model: ElasticModel) -> ElasticModel:
    """With a chat template."""
    assert model.tokenizer is not None
    model.tokenizer.chat_template = CHAT_TEMPLATE
    return model


@contextmanager
def tuning(
    model: ElasticModel,
    state: Path,
    seconds: float = 0.0,
    on_adapter: OnAdapter | None = None,
    *,
    maker: MakeTrainer | None = None,
    **settings: Any,
) -> Iterator[Tuning]:
    """Serve and train; a step takes at least so many seconds."""
    maker = maker or BigramMaker(seconds)
    adapters: list[tuple[JobCheckpoint, Path]] = []
    names = AdapterNames()

    def told(checkpoint: JobCheckpoint, directory: Path) -> None:
        adapters.append((checkpoint, directory))
        names.add_checkpoint(checkpoint, directory)

    jobs = new_jobs(state, maker, on_adapter or told, names.remove_checkpoint)
    try:
        with running(model, jobs=jobs, adapters=names, **settings) as server:
            yield Tuning(server, jobs, maker, adapters)
    finally:
        jobs.close()

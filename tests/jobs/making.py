"""Jobs over the package's tiny tokenizer, trained by the test itself, step by step."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import MakeTrainer
from flextron.jobs.jobs import Jobs, JobsSettings
from flextron.jobs.records import Job, Status
from flextron.workflows.tiny import tiny_model
from tests.finetuning.bigram import BigramMaker, train_alone

__all__ = [
    "CHAT_TEMPLATE",
    "CONTEXT",
    "NUM_STEPS",
    "RECORDS",
    "assert_as_alone",
    "jsonl",
    "messages",
    "new_jobs",
    "settled",
    "step",
    "tokenizer",
    "train",
    "upload",
]

CONTEXT = 64
NUM_STEPS = 8
"""Of a job of `settled` over `RECORDS`: 12 examples, 3 a step, 2 epochs."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORDS = [{"prompt": f"{a} and {b} are ", "completion": str(a + b)} for a in range(4) for b in range(3)]


def tokenizer() -> PreTrainedTokenizerBase:
    """With a chat template that writes turn after turn."""
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model())
    made.chat_template = CHAT_TEMPLATE
    return made


def jsonl(records: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def new_jobs(
    path: Path,
    maker: MakeTrainer | None = None,
    on_adapter: Any = None,
    on_deleted: Any = None,
    fingerprint: str | None = None,
    **settings: Any,
) -> Jobs:
    """A state is saved after every step unless the test says otherwise."""
    return Jobs(
        path,
        model="tiny",
        tokenizer=tokenizer(),
        context=CONTEXT,
        make_trainer=maker or BigramMaker(),
        fingerprint=fingerprint,
        on_adapter=on_adapter or (lambda checkpoint, directory: None),
        on_deleted=on_deleted or (lambda checkpoint: None),
        settings=JobsSettings(**{"save_seconds": 0.0, **settings}),
    )


def upload(jobs: Jobs, records: Iterable[Any] = RECORDS) -> str:
    return jobs.uploads.add("train.jsonl", "fine-tune", [jsonl(records)]).id


def settled(jobs: Jobs, records: Iterable[Any] = RECORDS, suffix: str | None = None, **hyperparameters: Any) -> Job:
    """A new job that has been validated."""
    chosen = Hyperparameters(**{"n_epochs": 2, "batch_size": 3, **hyperparameters})
    job = jobs.create(training_file=upload(jobs, records), suffix=suffix, hyperparameters=chosen, seed=1)
    jobs.wait_prepared(job.id)
    return jobs.repository.get(job.id)


def step(jobs: Jobs) -> bool:
    """Take an optimizer step of the job whose turn it is; False if there is none to take."""
    run = jobs.scheduler.next()
    if run is None:
        return False
    try:
        metrics = run.trainer.step()
    except Exception as error:
        jobs.scheduler.fail(run, error)
    else:
        jobs.scheduler.record(run, metrics)
    return True


def messages(jobs: Jobs, job_id: str) -> list[str]:
    return [event.message for event in jobs.repository.events(job_id, after=None, limit=100)[0]][::-1]


def train(jobs: Jobs, num_steps: int | None = None) -> int:
    """So many steps, or all there are."""
    done = 0
    while done != num_steps and step(jobs):
        done += 1
    return done


def _alone(path: Path, jobs: Jobs, job_id: str) -> tuple[list[float], torch.Tensor]:
    job = jobs.repository.get(job_id)
    (path / "alone").write_bytes(jsonl(RECORDS))
    dataset = read_dataset(path / "alone", tokenizer(), job.hyperparameters, CONTEXT)
    return train_alone(job.hyperparameters, dataset.examples, job.seed)


def assert_as_alone(path: Path, jobs: Jobs, job_id: str) -> None:
    """The same losses in the results, and the same adapter, to the bit."""
    job = jobs.repository.get(job_id)
    losses, weight_VV = _alone(path, jobs, job_id)
    assert job.status == Status.SUCCEEDED
    assert job.result_file is not None
    rows = list(csv.DictReader(jobs.uploads.path(job.result_file).read_text().splitlines()))
    assert [(int(r["step"]), float(r["train_loss"])) for r in rows] == list(enumerate(losses, start=1))
    trained = load_file(jobs.directory.adapter(job_id, len(losses)) / "adapter_model.safetensors")
    assert torch.equal(trained["weight"], weight_VV)

"""`kill -9` at random moments: nothing acknowledged is lost, and all jobs end as if nothing had happened."""

from __future__ import annotations

import csv
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file

from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import TrainingTask
from tests.finetuning.bigram import BigramMaker
from tests.jobs.making import CONTEXT, tokenizer
from tests.server.killed import Books, Child
from tests.server.running import wait_until

_EARLY = 0.2
"""Share of the runs that are killed while they start."""


def live_and_die(state: Path, books: Books) -> None:
    """One run of the server, from its start to its death."""
    child = Child(state)
    if books.rng.random() < _EARLY:
        time.sleep(books.rng.uniform(0, 1.5))
        child.kill()
    else:
        with child.client() as client:
            books.check(client)
            timer = threading.Timer(books.rng.uniform(0.02, 1.0), child.kill)
            timer.start()
            books.use(client)
            timer.join()
    child.join()


def read(path: Path, content: bytes, chosen: Hyperparameters) -> Sequence[Example]:
    (path / "data").write_bytes(content)
    return read_dataset(path / "data", tokenizer(), chosen, CONTEXT).examples


def assert_as_alone(path: Path, client: OpenAI, job: Any) -> None:
    """Losses and adapter of a job against training without a server."""
    chosen = Hyperparameters.from_dict(job.hyperparameters.to_dict())
    examples, validation = (
        [] if file_id is None else read(path, client.files.content(file_id).content, chosen)
        for file_id in (job.training_file, job.validation_file)
    )
    alone = BigramMaker()(TrainingTask(hyperparameters=chosen, examples=examples, validation=validation, seed=job.seed))
    steps = [alone.step() for _ in range(alone.num_steps)]
    rows = list(csv.DictReader(client.files.content(job.result_files[0]).text.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, len(steps) + 1))
    assert [float(row["train_loss"]) for row in rows] == [step.loss for step in steps]
    wanted = ["" if step.valid_loss is None else str(step.valid_loss) for step in steps]
    assert [row["valid_loss"] for row in rows] == wanted
    assert any(wanted) == bool(validation)
    adapter = load_file(path / "state" / "jobs" / job.id / f"step-{len(steps)}" / "adapter_model.safetensors")
    assert torch.equal(adapter["weight"], alone.weight_VV)


def kept(books: Books) -> list[str]:
    """Jobs that nobody has asked to cancel."""
    return [job_id for job_id in books.jobs if books.statuses.get(job_id) != "cancelled"]


def check_runs(path: Path, num_runs: int, seed: int) -> None:
    state, books = path / "state", Books(random.Random(seed))
    # how much a life gets done depends on the machine: a slow one lives a few more
    while num_runs > 0 or len(kept(books)) < 3:
        live_and_die(state, books)
        num_runs -= 1
    child = Child(state)
    with child.client() as client:
        books.check(client)
        jobs = client.fine_tuning.jobs
        for job in jobs.list(limit=100):
            if job.status == "paused":  # type: ignore[comparison-overlap]
                jobs.resume(job.id)
        wait_until(lambda: all(job.status in ("succeeded", "cancelled") for job in jobs.list(limit=100)), 120)
        ended = list(jobs.list(limit=100))
        assert {job.id for job in ended} >= books.jobs.keys()
        succeeded = [job for job in ended if job.status == "succeeded"]
        # a cancellation may have been done though its answer never came, so not all that are kept need be here
        assert succeeded
        for job in succeeded:
            assert_as_alone(path, client, job)
    child.kill()
    child.join()
    told = (path / "hook.log").read_text().splitlines()
    assert len(told) >= len(succeeded)
    # a line may end where a run did
    assert not [line for line in told if line.endswith("False")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_runs(tmp_path: Path) -> None:
    check_runs(tmp_path, 50, seed=1)

"""Validation files: scored after the right steps, and refused where they are bad."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from flextron.errors import FlextronError
from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import TrainingTask
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import Job, Status
from tests.finetuning.bigram import BigramMaker
from tests.jobs.making import (
    CONTEXT,
    NUM_STEPS,
    RECORDS,
    assert_as_alone,
    jsonl,
    messages,
    new_jobs,
    tokenizer,
    train,
    upload,
)


def with_validation(jobs: Jobs, records: Any, **hyperparameters: Any) -> Job:
    """As `settled`, with a second file."""
    chosen = Hyperparameters(n_epochs=2, batch_size=3, **hyperparameters)
    files = {"training_file": upload(jobs), "validation_file": upload(jobs, records)}
    job = jobs.create(**files, hyperparameters=chosen, seed=1)
    jobs.wait_prepared(job.id)
    return jobs.repository.get(job.id)


def test_validation(tmp_path: Path) -> None:
    """Of the right examples after the right steps, in events, checkpoints and results, whether restarted or not."""
    jobs = new_jobs(tmp_path / "state")
    job = with_validation(jobs, RECORDS[:5], checkpoint_every=3)
    assert messages(jobs, job.id)[-1] == (
        "the file holds 12 examples, that for validation 5; the job waits for its turn"
    )
    with pytest.raises(FlextronError, match=f"the job {job.id} needs this file"):
        jobs.uploads.delete(str(job.validation_file))
    train(jobs, 4)
    jobs.close()
    jobs = new_jobs(tmp_path / "state")
    jobs.wait_prepared(job.id)
    train(jobs)
    assert_as_alone(tmp_path, jobs, job.id)
    (tmp_path / "valid").write_bytes(jsonl(RECORDS[:5]))
    held_out = read_dataset(tmp_path / "valid", tokenizer(), job.hyperparameters, CONTEXT).examples
    (tmp_path / "train").write_bytes(jsonl(RECORDS))
    data = read_dataset(tmp_path / "train", tokenizer(), job.hyperparameters, CONTEXT).examples
    alone = BigramMaker()(TrainingTask(hyperparameters=job.hyperparameters, examples=data, validation=held_out, seed=1))
    losses = {step: alone.step().valid_loss for step in range(1, NUM_STEPS + 1)}
    assert [step for step, loss in losses.items() if loss is not None] == [3, 4, 6, 8]
    assert {step: m.valid_loss for step, m in jobs.repository.steps(job.id)} == losses
    checkpoints = jobs.repository.checkpoints(job.id, after=None, limit=10)[0]
    assert [(c.step, c.valid_loss) for c in checkpoints] == [(step, losses[step]) for step in (8, 6, 3)]
    events = [e for e in jobs.repository.events(job.id, after=None, limit=100)[0] if e.type == "metrics"]
    for event in events:
        found = {event.data.get(key) for key in ("valid_loss", "full_valid_loss")}
        assert found == {losses[event.data["step"]]}
        assert ("validation loss" in event.message) == ("valid_loss" in event.data)
    rows = csv.DictReader(jobs.uploads.path(str(jobs.repository.get(job.id).result_file)).read_text().splitlines())
    assert [row["valid_loss"] for row in rows] == ["" if loss is None else str(loss) for loss in losses.values()]
    jobs.close()


def test_bad_validation_files(jobs: Jobs) -> None:
    for records, said in (([*RECORDS[:2], {"prompt": 1}], "line 3 "), ([], "no example")):
        job = with_validation(jobs, records)
        assert job.status == Status.FAILED
        assert job.error is not None
        assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")
        assert said in job.error.message
    with pytest.raises(FlextronError, match="there is no file 'file-nothing' for finetuning"):
        jobs.create(training_file=upload(jobs), validation_file="file-nothing")
    long = with_validation(jobs, [{"prompt": "a", "completion": "b " * 100}])
    assert "1 validation examples were cut to the allowed length" in messages(jobs, long.id)

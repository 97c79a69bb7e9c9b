"""Suffixes, and files that jobs need."""

from __future__ import annotations

import pytest

from flextron.errors import FlextronError
from flextron.jobs.jobs import Jobs
from tests.jobs.making import (
    settled,
    train,
    upload,
)


def test_suffixes_are_used_once(jobs: Jobs) -> None:
    file = upload(jobs)
    first = jobs.create(training_file=file, suffix="mine")
    with pytest.raises(FlextronError, match="another job has the suffix 'mine'"):
        jobs.create(training_file=file, suffix="mine")
    jobs.cancel(first.id)
    jobs.create(training_file=file, suffix="mine")
    jobs.create(training_file=file)
    jobs.create(training_file=file)


def test_a_deleted_adapter_frees_its_suffix(jobs: Jobs) -> None:
    first = settled(jobs, suffix="mine", checkpoint_every=4)
    train(jobs)
    name = jobs.repository.get(first.id).fine_tuned_model
    assert name is not None
    jobs.delete_adapter(f"{name}:ckpt-step-4")
    with pytest.raises(FlextronError, match="another job has the suffix 'mine'"):
        jobs.create(training_file=first.training_file, suffix="mine")
    jobs.delete_adapter(name)
    again = jobs.create(training_file=first.training_file, suffix="mine")
    assert jobs.repository.get(first.id).fine_tuned_model == name
    with pytest.raises(FlextronError, match="another job has the suffix 'mine'"):
        jobs.create(training_file=first.training_file, suffix="mine")
    jobs.cancel(again.id)


def test_files_that_jobs_need_stay(jobs: Jobs) -> None:
    job = settled(jobs)
    with pytest.raises(FlextronError, match=f"the job {job.id} needs this file"):
        jobs.uploads.delete(job.training_file)
    jobs.cancel(job.id)
    jobs.uploads.delete(job.training_file)
    assert not list(jobs.directory.files.iterdir())
    with pytest.raises(FlextronError, match="there is no file"):
        jobs.create(training_file=job.training_file)

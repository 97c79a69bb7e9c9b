"""A job that ends the process is tried twice, whatever it was doing; others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flextron.finetuning.trainer import TrainingTask
from flextron.jobs import loader as preparer
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import Status
from flextron.jobs.running_job import RunningJob
from tests.finetuning.bigram import BigramMaker
from tests.jobs.making import RECORDS, new_jobs, settled, step, upload
from tests.server.running import wait_until

_context = multiprocessing.get_context("forkserver")
# the imports take longer than all the rest
_context.set_forkserver_preload(["tests.jobs.making"])
BAD = [{"prompt": "abort", "completion": " now"}]


def _die(*arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class _Deadly(BigramMaker):
    """Ends the process at the work for a file of one example."""

    def __init__(self, work: str) -> None:
        super().__init__()
        self._work = work

    def __call__(self, task: TrainingTask) -> Any:
        trainer = super().__call__(task)
        if len(task.examples) == len(BAD) and self._work == "making":
            _die()
        if len(task.examples) == len(BAD) and self._work == "stepping":
            trainer.step = _die  # type: ignore[method-assign]
        return trainer


def train(jobs: Jobs) -> None:
    """Until all have ended."""
    wait_until(lambda: all(job.status != Status.VALIDATING for job in jobs.repository.page(after=None, limit=9)[0]))
    while jobs.repository.with_status(Status.QUEUED, Status.RUNNING):
        if not step(jobs):
            jobs.scheduler.wait(0.05)
    jobs.close()


def live(path: Path, work: str) -> None:
    """A process that reads and trains until all jobs have ended, or until it dies."""
    if work == "reading":
        read = preparer.read_dataset

        def reads(path: Path, *others: Any) -> Any:
            return _die() if b"abort" in path.read_bytes() else read(path, *others)

        preparer.read_dataset = reads  # type: ignore[assignment]
    train(new_jobs(path, _Deadly(work), max_training=2))


@pytest.mark.parametrize("work", ["reading", "making", "stepping"])
def test_after_two_deaths_a_job_has_failed(tmp_path: Path, work: str) -> None:
    jobs = new_jobs(tmp_path)
    good = jobs.create(training_file=upload(jobs, RECORDS), seed=1)
    bad = jobs.create(training_file=upload(jobs, BAD), seed=1)
    other = jobs.create(training_file=upload(jobs, RECORDS), seed=1)
    jobs.close()
    codes = []
    for _ in range(3):
        process = _context.Process(target=live, args=(tmp_path, work))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
    assert codes == [-9, -9, 0]
    jobs = new_jobs(tmp_path)
    found = jobs.repository.get(bad.id)
    assert found.status == Status.FAILED
    assert found.error is not None
    assert "died 2 times" in found.error.message
    assert {jobs.repository.get(job.id).status for job in (good, other)} == {Status.SUCCEEDED}
    assert not list((tmp_path / "attempts").iterdir())
    jobs.close()


def test_one_death_is_forgiven_and_an_end_is_no_death(tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path)
    job = settled(jobs)
    for _ in range(4):
        assert isinstance(jobs.scheduler.next(), RunningJob)
        jobs.close()
        jobs = new_jobs(tmp_path)
        jobs.wait_prepared(job.id)
    # as if the process had been killed
    (tmp_path / "attempts" / f"{job.id}.stepping").write_text("1")
    (tmp_path / "attempts" / "ftjob-gone.reading").write_text("")
    jobs.close()
    jobs = new_jobs(tmp_path)
    train(jobs)
    jobs = new_jobs(tmp_path)
    assert jobs.repository.get(job.id).status == Status.SUCCEEDED
    assert not list((tmp_path / "attempts").iterdir())
    jobs.close()

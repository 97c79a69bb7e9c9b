"""A job's life without HTTP: restarts, crashes, pauses, cancelling, and resumption to the bit."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from flextron.errors import FlextronError
from flextron.jobs.database import UnknownIdError
from flextron.jobs.directory import StateDirectory
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import JobCheckpoint, Status
from tests.finetuning.bigram import is_whole
from tests.jobs.making import (
    NUM_STEPS,
    assert_as_alone,
    messages,
    new_jobs,
    settled,
    train,
)


def test_a_life(tmp_path: Path) -> None:
    told: list[tuple[JobCheckpoint, Path]] = []
    jobs = new_jobs(tmp_path / "state", on_adapter=lambda checkpoint, directory: told.append((checkpoint, directory)))
    job = settled(jobs, suffix="sums", checkpoint_every=3)
    assert (job.status, job.finished_at, job.fine_tuned_model) == (Status.QUEUED, None, None)
    assert train(jobs, 1) == 1
    assert jobs.repository.get(job.id).status == Status.RUNNING
    assert jobs.scheduler.estimated_finish(job.id) is not None
    assert train(jobs) == NUM_STEPS - 1
    assert_as_alone(tmp_path, jobs, job.id)
    job = jobs.repository.get(job.id)
    assert job.fine_tuned_model == f"ft:tiny:flextron:sums:{job.id[-8:]}"
    assert job.finished_at is not None
    steps = [c.step for c in jobs.repository.checkpoints(job.id, after=None, limit=10)[0]]
    assert steps == [8, 6, 3]
    assert [(c.step, c.name) for c, _ in told] == [
        (3, f"{job.fine_tuned_model}:ckpt-step-3"),
        (6, f"{job.fine_tuned_model}:ckpt-step-6"),
        (8, job.fine_tuned_model),
    ]
    assert all(is_whole(directory, c.step) for c, directory in told)
    assert jobs.repository.trained_tokens(job.id) == sum(m.num_tokens for _, m in jobs.repository.steps(job.id)) > 0
    assert not jobs.directory.state(job.id).exists()
    assert messages(jobs, job.id)[-2:] == [f"new adapter: {job.fine_tuned_model}", "the job has succeeded"]
    assert jobs.scheduler.estimated_finish(job.id) is None
    jobs.close()
    # a new start tells of what is there
    again: list[tuple[JobCheckpoint, Path]] = []
    new_jobs(tmp_path / "state", on_adapter=lambda c, d: again.append((c, d))).close()
    assert again == told


@pytest.mark.parametrize("save_seconds", [0.0, 1000.0])
def test_a_restart_resumes_exactly(tmp_path: Path, save_seconds: float) -> None:
    jobs = new_jobs(tmp_path / "state", save_seconds=save_seconds)
    job = settled(jobs)
    for _ in range(3):
        assert train(jobs, 2) == 2
        jobs.close()
        jobs = new_jobs(tmp_path / "state", save_seconds=save_seconds)
        jobs.wait_prepared(job.id)
    assert train(jobs) == NUM_STEPS - 6
    assert "resumed after step 4" in messages(jobs, job.id)
    assert_as_alone(tmp_path, jobs, job.id)
    jobs.close()


def test_after_a_crash_adapters_stay_as_they_are(tmp_path: Path) -> None:
    told: list[int] = []
    running = new_jobs(tmp_path / "state", save_seconds=1000.0)
    job = settled(running, checkpoint_every=2)
    train(running, 5)
    seen = running.repository.events(job.id, after=None, limit=100)[0]
    # what a crash at this moment leaves: no state was saved
    shutil.copytree(tmp_path / "state", tmp_path / "crashed")
    running.close()
    adapters = StateDirectory(tmp_path / "crashed")
    before = {step: adapters.adapter(job.id, step).stat().st_ino for step in (2, 4)}
    adapters.close()
    jobs = new_jobs(tmp_path / "crashed", on_adapter=lambda checkpoint, directory: told.append(checkpoint.step))
    jobs.wait_prepared(job.id)
    assert train(jobs) == NUM_STEPS
    assert told == [2, 4, 6, 8]
    assert {step: jobs.directory.adapter(job.id, step).stat().st_ino for step in before} == before
    assert jobs.repository.events(job.id, after=None, limit=100)[0][-len(seen) :] == seen
    assert_as_alone(tmp_path, jobs, job.id)
    jobs.close()


def test_an_adapter_can_be_used_as_soon_as_its_name_is_told(tmp_path: Path) -> None:
    usable, told, has_ended = set[str](), set[str | None](), threading.Event()

    def on_adapter(checkpoint: JobCheckpoint, directory: Path) -> None:
        time.sleep(0.05)
        usable.add(checkpoint.name)

    jobs = new_jobs(tmp_path / "state", on_adapter=on_adapter)
    job = settled(jobs, checkpoint_every=2)

    def watch() -> None:
        while not has_ended.is_set():
            checkpoints, _ = jobs.checkpoints(job.id, after=None, limit=10)
            (listed,), _ = jobs.page(after=None, limit=10)
            models = {jobs.get(job.id).fine_tuned_model, listed.fine_tuned_model} - {None}
            told.update(({c.name for c in checkpoints} | models) - usable)

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(jobs)
    has_ended.set()
    watcher.join()
    assert len(usable) == NUM_STEPS // 2
    assert not told
    jobs.close()


def test_pause_and_resume(tmp_path: Path, jobs: Jobs) -> None:
    job = settled(jobs)
    train(jobs, 3)
    assert jobs.pause(job.id).status == Status.PAUSED
    assert train(jobs) == 0
    with pytest.raises(FlextronError, match="is paused, so it cannot be paused"):
        jobs.pause(job.id)
    assert jobs.resume(job.id).status == Status.QUEUED
    jobs.wait_prepared(job.id)
    assert train(jobs) == NUM_STEPS - 3
    assert_as_alone(tmp_path, jobs, job.id)
    for change in (jobs.pause, jobs.resume, jobs.cancel):
        with pytest.raises(FlextronError, match="is succeeded, so it cannot be"):
            change(job.id)
        with pytest.raises(UnknownIdError):
            change("ftjob-nothing")


def test_pause_and_resume_between_two_steps(tmp_path: Path, jobs: Jobs) -> None:
    job = settled(jobs)
    train(jobs, 3)
    jobs.pause(job.id)
    jobs.resume(job.id)
    jobs.wait_prepared(job.id)
    assert train(jobs) == NUM_STEPS - 3
    assert not jobs.preparer.held()
    assert_as_alone(tmp_path, jobs, job.id)


def test_a_pause_during_the_last_step(tmp_path: Path, jobs: Jobs) -> None:
    job = settled(jobs)
    train(jobs, NUM_STEPS - 1)
    run = jobs.scheduler.next()
    assert run is not None
    metrics = run.trainer.step()
    jobs.pause(job.id)
    jobs.scheduler.record(run, metrics)
    assert jobs.repository.get(job.id).status == Status.PAUSED
    assert train(jobs) == 0
    jobs.resume(job.id)
    jobs.wait_prepared(job.id)
    assert train(jobs) == 1
    assert_as_alone(tmp_path, jobs, job.id)


@pytest.mark.parametrize("num_steps", [0, 3, NUM_STEPS - 1])
def test_pause_and_resume_during_a_step(tmp_path: Path, jobs: Jobs, num_steps: int) -> None:
    job = settled(jobs)
    train(jobs, num_steps)
    run = jobs.scheduler.next()
    assert run is not None
    metrics = run.trainer.step()
    jobs.pause(job.id)
    jobs.resume(job.id)
    jobs.wait_prepared(job.id)
    jobs.scheduler.record(run, metrics)
    assert train(jobs) == NUM_STEPS - num_steps - 1
    assert not jobs.preparer.held()
    assert_as_alone(tmp_path, jobs, job.id)


@pytest.mark.parametrize("num_steps", [0, 3, NUM_STEPS - 1])
def test_cancel_during_a_step(jobs: Jobs, num_steps: int) -> None:
    job = settled(jobs, checkpoint_every=2)
    train(jobs, num_steps)
    run = jobs.scheduler.next()
    assert run is not None
    metrics = run.trainer.step()
    assert jobs.cancel(job.id).status == Status.CANCELLED
    jobs.scheduler.record(run, metrics)
    assert train(jobs) == 0
    found = jobs.repository.get(job.id)
    assert (found.status, found.fine_tuned_model, found.result_file) == (Status.CANCELLED, None, None)
    assert found.finished_at is not None
    assert len(jobs.repository.steps(job.id)) == num_steps
    assert not jobs.directory.state(job.id).exists()
    assert len(jobs.uploads.page(purpose=None, after=None, limit=10, is_rising=True)[0]) == 1
    assert len(list(jobs.directory.files.iterdir())) == 1

"""Losses that are no numbers, trainers that fail, damaged states and files, and a full disk."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from flextron.errors import FlextronError
from flextron.finetuning.trainer import StepMetrics
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import Status
from tests.finetuning.bigram import BigramMaker, is_whole
from tests.jobs.making import (
    NUM_STEPS,
    RECORDS,
    assert_as_alone,
    messages,
    new_jobs,
    settled,
    train,
)


def test_a_loss_that_is_no_number(jobs: Jobs, tmp_path: Path) -> None:
    bad, good = settled(jobs, n_epochs=50, learning_rate_multiplier=1e6), settled(jobs)
    train(jobs)
    found = jobs.repository.get(bad.id)
    assert found.status == Status.FAILED
    assert found.error is not None
    assert "the training loss became" in found.error.message
    assert "lower learning_rate or learning_rate_multiplier" in found.error.message
    assert found.error.code == "training_failed"
    assert not jobs.directory.state(bad.id).exists()
    assert_as_alone(tmp_path, jobs, good.id)


def test_losses_that_are_no_numbers_are_named() -> None:
    StepMetrics(loss=1.0, num_tokens=1).check(3)
    StepMetrics(loss=1.0, num_tokens=1, valid_loss=2.0).check(3)
    for losses, said in (
        ({"loss": math.nan}, "the training loss became nan at step 3; lower learning_rate"),
        ({"loss": 1.0, "valid_loss": math.inf}, "the validation loss became inf at step 3; lower learning_rate"),
    ):
        with pytest.raises(FlextronError, match=said):
            StepMetrics(**losses, num_tokens=1).check(3)


@pytest.mark.parametrize(
    ("fault", "said"), [(FlextronError("not with this model"), "not with"), (RuntimeError("x"), "unexpected error")]
)
def test_trainers_that_fail(jobs: Jobs, maker: BigramMaker, fault: Exception, said: str) -> None:
    job = settled(jobs)
    train(jobs, 2)
    maker.fault = fault
    train(jobs)
    found = jobs.repository.get(job.id)
    assert found.status == Status.FAILED
    assert found.error is not None
    assert said in found.error.message


def test_a_damaged_state_fails_its_job_alone(tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path / "state")
    bad, good = settled(jobs), settled(jobs)
    train(jobs, 4)
    jobs.close()
    (jobs.directory.state(bad.id) / "state.safetensors").write_bytes(b"\0" * 20)
    jobs = new_jobs(tmp_path / "state")
    jobs.wait_prepared(bad.id)
    jobs.wait_prepared(good.id)
    train(jobs)
    assert jobs.repository.get(bad.id).status == Status.FAILED
    assert_as_alone(tmp_path, jobs, good.id)
    jobs.close()


@pytest.mark.parametrize("checkpoint_every", [1, None])
def test_a_full_disk_pauses_the_job(
    tmp_path: Path, jobs: Jobs, maker: BigramMaker, checkpoint_every: int | None
) -> None:
    """Once while the adapter is written, once while the state is."""
    job = settled(jobs, checkpoint_every=checkpoint_every)
    train(jobs, 3)
    maker.disk_is_full.set()
    train(jobs)
    assert jobs.repository.get(job.id).status == Status.PAUSED
    event = jobs.repository.events(job.id, after=None, limit=1)[0][0]
    assert event.level == "error"
    assert "paused at its last saved state: no space is left to write" in event.message
    for checkpoint in jobs.repository.checkpoints(job.id, after=None, limit=10)[0]:
        assert is_whole(jobs.directory.adapter(job.id, checkpoint.step), checkpoint.step)
    maker.disk_is_full.clear()
    jobs.resume(job.id)
    jobs.wait_prepared(job.id)
    train(jobs)
    assert_as_alone(tmp_path, jobs, job.id)


def test_a_full_disk_when_a_client_pauses(tmp_path: Path, maker: BigramMaker) -> None:
    jobs = new_jobs(tmp_path / "state", maker, save_seconds=1000.0)
    job = settled(jobs)
    train(jobs, 3)
    maker.disk_is_full.set()
    jobs.pause(job.id)
    train(jobs)
    assert "rests at its last saved state" in messages(jobs, job.id)[-1]
    maker.disk_is_full.clear()
    jobs.resume(job.id)
    jobs.wait_prepared(job.id)
    assert train(jobs) == NUM_STEPS
    assert_as_alone(tmp_path, jobs, job.id)
    jobs.close()


FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)], check=True)
from flextron.files import NoSpaceError
from flextron.jobs.records import Status
from tests.jobs.making import new_jobs, settled, step
jobs = new_jobs(disk / "state")
job = settled(jobs, n_epochs=1000)
for _ in range(4):
    step(jobs)
filler = disk / "filler"
handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
try:
    while os.write(handle, b"0" * 4096):
        pass
except OSError:
    os.close(handle)
stalls = 0
for _ in range(300):
    try:
        step(jobs)
    except NoSpaceError:
        stalls += 1
try:
    jobs.uploads.add("a", "fine-tune", [b"0" * 9000])
    raise SystemExit("there was room")
except NoSpaceError:
    pass
filler.unlink()
status = jobs.repository.get(job.id).status
assert status in (Status.RUNNING, Status.PAUSED), status
assert len(jobs.repository.steps(job.id)) < 1000
jobs.close()
jobs = new_jobs(disk / "state")
if status == Status.PAUSED:
    jobs.resume(job.id)
jobs.wait_prepared(job.id)
before = len(jobs.repository.steps(job.id))
for _ in range(before + 5):
    assert step(jobs)
assert jobs.repository.get(job.id).status == Status.RUNNING
assert len(jobs.repository.steps(job.id)) > before
print("well", stalls)
"""


@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"]).returncode != 0, reason="no namespaces of mounts here")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    command = ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "well" in done.stdout, done.stderr


def test_bad_files_fail_their_jobs(jobs: Jobs) -> None:
    job = settled(jobs, [*RECORDS, {"prompt": 1}])
    assert job.status == Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert job.error.message.startswith("line 13 ")

"""Jobs without HTTP: their life, fairness, exact resumption, faults."""

from __future__ import annotations

import csv
import math
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flextron.errors import FlextronError
from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import StepMetrics
from flextron.jobs.database import UnknownIdError
from flextron.jobs.driver import TrainingDriver
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import Checkpoint, Job, Status
from tests.finetuning.bigram import BigramMaker, is_whole, train_alone
from tests.jobs.making import CONTEXT, RECORDS, jsonl, new_jobs, settled, step, tokenizer, upload
from tests.server.running import wait_until

NUM_STEPS = 8
"""Of a job of `settled` over `RECORDS`: 12 examples, 3 a step, 2 epochs."""


@pytest.fixture
def maker() -> BigramMaker:
    return BigramMaker()


@pytest.fixture
def jobs(tmp_path: Path, maker: BigramMaker) -> Iterator[Jobs]:
    made = new_jobs(tmp_path / "state", maker)
    yield made
    made.close()


def messages(jobs: Jobs, job_id: str) -> list[str]:
    return [event.message for event in jobs.repository.events(job_id, after=None, limit=100)[0]][::-1]


def train(jobs: Jobs, num_steps: int | None = None) -> int:
    """So many steps, or all there are."""
    done = 0
    while done != num_steps and step(jobs):
        done += 1
    return done


def alone(path: Path, jobs: Jobs, job_id: str) -> tuple[list[float], torch.Tensor]:
    job = jobs.repository.get(job_id)
    (path / "alone").write_bytes(jsonl(RECORDS))
    dataset = read_dataset(path / "alone", tokenizer(), job.hyperparameters, CONTEXT)
    return train_alone(job.hyperparameters, dataset.examples, job.seed)


def assert_as_alone(path: Path, jobs: Jobs, job_id: str) -> None:
    """The same losses in the results, and the same adapter, to the bit."""
    job = jobs.repository.get(job_id)
    losses, weight_VV = alone(path, jobs, job_id)
    assert job.status == Status.SUCCEEDED
    assert job.result_file is not None
    rows = list(csv.DictReader(jobs.uploads.path(job.result_file).read_text().splitlines()))
    assert [(int(r["step"]), float(r["train_loss"])) for r in rows] == list(enumerate(losses, start=1))
    trained = load_file(jobs._directory.adapter(job_id, len(losses)) / "adapter_model.safetensors")
    assert torch.equal(trained["weight"], weight_VV)


def test_a_life(tmp_path: Path) -> None:
    told: list[tuple[Checkpoint, Path]] = []
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
    assert not jobs._directory.state(job.id).exists()
    assert messages(jobs, job.id)[-2:] == [f"new adapter: {job.fine_tuned_model}", "the job has succeeded"]
    assert jobs.scheduler.estimated_finish(job.id) is None
    jobs.close()
    # a new start tells of what is there
    again: list[tuple[Checkpoint, Path]] = []
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
    jobs = new_jobs(tmp_path / "state", save_seconds=1000.0)
    job = settled(jobs, checkpoint_every=2)
    train(jobs, 5)
    before = {step: jobs._directory.adapter(job.id, step).stat().st_ino for step in (2, 4)}
    seen = jobs.repository.events(job.id, after=None, limit=100)[0]
    # gone without a word: no state was saved
    jobs._store.close()
    jobs._directory.close()
    jobs = new_jobs(tmp_path / "state", on_adapter=lambda checkpoint, directory: told.append(checkpoint.step))
    jobs.wait_prepared(job.id)
    assert train(jobs) == NUM_STEPS
    assert told == [2, 4, 6, 8]
    assert {step: jobs._directory.adapter(job.id, step).stat().st_ino for step in before} == before
    assert jobs.repository.events(job.id, after=None, limit=100)[0][-len(seen) :] == seen
    assert_as_alone(tmp_path, jobs, job.id)
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
    assert not jobs._preparer.held()
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
    assert not jobs._directory.state(job.id).exists()
    assert len(jobs.uploads.page(purpose=None, after=None, limit=10, is_rising=True)[0]) == 1
    assert len(list(jobs._directory.files.iterdir())) == 1


def test_jobs_at_once_share_fairly(tmp_path: Path) -> None:
    """Eight with examples of different lengths: their tokens differ by less than a tenth."""
    jobs = new_jobs(tmp_path / "state", save_seconds=1000.0)
    made = [
        settled(jobs, [{"prompt": "a " * (1 + 3 * i), "completion": "b"}] * (4 + i), n_epochs=500, batch_size=1 + i % 3)
        for i in range(8)
    ]
    train(jobs, 600)
    tokens = [jobs.repository.trained_tokens(job.id) for job in made]
    assert {jobs.repository.get(job.id).status for job in made} == {Status.RUNNING}
    assert max(tokens) / min(tokens) < 1.1
    # one that joins later gets the same from then on
    late = settled(jobs, n_epochs=500)
    jobs.cancel(made[0].id)
    before = {job.id: jobs.repository.trained_tokens(job.id) for job in [*made[1:], late]}
    train(jobs, 600)
    since = [jobs.repository.trained_tokens(job_id) - n for job_id, n in before.items()]
    assert max(since) / min(since) < 1.1
    jobs.close()


def test_jobs_beyond_the_limit_wait_in_their_order(tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path / "state", max_training=2)
    made = [settled(jobs) for _ in range(4)]
    train(jobs, 4)
    statuses = [jobs.repository.get(job.id).status for job in made]
    assert statuses == [Status.RUNNING, Status.RUNNING, Status.QUEUED, Status.QUEUED]
    assert train(jobs) == 4 * NUM_STEPS - 4
    for job in made:
        assert_as_alone(tmp_path, jobs, job.id)
    jobs.close()


def test_a_loss_that_is_no_number(jobs: Jobs, tmp_path: Path) -> None:
    bad, good = settled(jobs, n_epochs=50, learning_rate_multiplier=1e6), settled(jobs)
    train(jobs)
    found = jobs.repository.get(bad.id)
    assert found.status == Status.FAILED
    assert found.error is not None
    assert "the training loss became" in found.error.message
    assert "lower learning_rate or learning_rate_multiplier" in found.error.message
    assert found.error.code == "training_failed"
    assert not jobs._directory.state(bad.id).exists()
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
    (jobs._directory.state(bad.id) / "state.safetensors").write_bytes(b"\0" * 20)
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
        assert is_whole(jobs._directory.adapter(job.id, checkpoint.step), checkpoint.step)
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


def test_the_second_server_is_refused(tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path / "state")
    with pytest.raises(FlextronError, match="in use by another process; give each one of its own"):
        new_jobs(tmp_path / "state")
    script = "import sys; from pathlib import Path; from flextron.jobs.directory import StateDirectory as S; "
    command = [sys.executable, "-c", script + "S(Path(sys.argv[1]))", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "in use by another process" in done.stderr.splitlines()[-1]
    jobs.close()
    assert subprocess.run(command).returncode == 0


def test_directories_that_do_not_do(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(FlextronError, match="cannot be used"):
        new_jobs(tmp_path / "a-file")
    new_jobs(tmp_path / "state").close()
    with sqlite3.connect(tmp_path / "state" / "state.sqlite") as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(FlextronError, match="is of format 7"):
        new_jobs(tmp_path / "state")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "state.sqlite").write_bytes(b"no database " * 100)
    with pytest.raises(FlextronError, match="cannot be used"):
        new_jobs(tmp_path / "bad")


def test_leftovers_are_removed(tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path / "state")
    job = settled(jobs)
    train(jobs, 2)
    jobs.close()
    state = tmp_path / "state"
    lefts = [state / "files" / ".file-x.1.tmp", state / "files" / "file-not-entered"]
    for left in lefts:
        left.write_bytes(b"half")
    (state / "jobs" / job.id / ".step-3-abc").mkdir()
    (state / "jobs" / job.id / ".step-3-abc" / "adapter_config.json").touch()
    (state / "jobs" / "ftjob-ended" / "state").mkdir(parents=True)
    again = new_jobs(state)
    assert [p.name for p in (state / "files").iterdir()] == [job.training_file]
    assert [p.name for p in (state / "jobs" / job.id).iterdir()] == ["state"]
    assert not (state / "jobs" / "ftjob-ended" / "state").exists()
    again.close()


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


def test_other_weights_are_refused(tmp_path: Path) -> None:
    new_jobs(tmp_path / "state").close()  # of an earlier version, which asked for no fingerprint
    for _ in range(2):
        new_jobs(tmp_path / "state", fingerprint="these").close()
    with pytest.raises(FlextronError, match=r"is of other weights .* 'tiny' now, .* another one \(--state-directory\)"):
        new_jobs(tmp_path / "state", fingerprint="others")
    new_jobs(tmp_path / "state", fingerprint="these").close()
    new_jobs(tmp_path / "another", fingerprint="others").close()


def test_files_that_jobs_need_stay(jobs: Jobs) -> None:
    job = settled(jobs)
    with pytest.raises(FlextronError, match=f"the job {job.id} needs this file"):
        jobs.uploads.delete(job.training_file)
    jobs.cancel(job.id)
    jobs.uploads.delete(job.training_file)
    assert not list(jobs._directory.files.iterdir())
    with pytest.raises(FlextronError, match="there is no file"):
        jobs.create(training_file=job.training_file)


def test_bad_files_fail_their_jobs(jobs: Jobs) -> None:
    job = settled(jobs, [*RECORDS, {"prompt": 1}])
    assert job.status == Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert job.error.message.startswith("line 13 ")


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
    alone = BigramMaker()(job.hyperparameters, data, 1, None, held_out)
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


def test_directories_of_the_format_before(tmp_path: Path) -> None:
    """They had no validation, suffixes stayed taken, and nothing was known of the weights."""
    jobs = new_jobs(tmp_path / "state")
    job, done, deleted = settled(jobs), settled(jobs, suffix="done", checkpoint_every=4), settled(jobs, suffix="free")
    jobs.pause(job.id)
    train(jobs)
    jobs.resume(job.id)
    jobs.delete_adapter(str(jobs.repository.get(deleted.id).fine_tuned_model))
    jobs.close()
    with sqlite3.connect(tmp_path / "state" / "state.sqlite") as database:
        database.execute("DROP INDEX one_suffix")
        database.execute("DROP TABLE weights")
        for table, column in (
            ("jobs", "validation_file"),
            ("jobs", "is_deleted"),
            *((table, column) for table in ("steps", "checkpoints") for column in ("valid_loss", "valid_accuracy")),
        ):
            database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        database.execute("CREATE UNIQUE INDEX one_suffix ON jobs (model, suffix)")
        database.execute("PRAGMA user_version = 2")
    database.close()
    jobs = new_jobs(tmp_path / "state", fingerprint="these")
    jobs.wait_prepared(job.id)
    train(jobs)
    for made in (job, done):
        assert_as_alone(tmp_path, jobs, made.id)
    jobs.create(training_file=job.training_file, suffix="free")
    with pytest.raises(FlextronError, match="another job has the suffix 'done'"):
        jobs.create(training_file=job.training_file, suffix="done")
    jobs.close()
    with pytest.raises(FlextronError, match="is of other weights"):
        new_jobs(tmp_path / "state", fingerprint="others")


def test_a_step_that_ends_with_the_driver_is_in_the_books(tmp_path: Path) -> None:
    made = new_jobs(tmp_path / "state")
    job = settled(made)
    driver = TrainingDriver(made)
    driver.start()
    for number in (1, 2, 3):
        wait_until(lambda: driver.unit is not None)
        if number == 3:
            driver._is_ending.set()
        while driver.unit is not None:
            driver.run_unit(1)
    driver.stop()
    made.close()
    again = new_jobs(tmp_path / "state")
    again.wait_prepared(job.id)
    assert train(again) == NUM_STEPS - 3
    assert [step for step, _ in again.repository.steps(job.id)] == list(range(1, NUM_STEPS + 1))
    again.close()


def test_many_threads_at_once(jobs: Jobs) -> None:
    """Clients create, pause, resume and cancel while training goes on; the books balance."""
    is_ending = threading.Event()

    def train() -> None:
        while not is_ending.is_set():
            if not step(jobs):
                jobs.scheduler.wait(0.05)

    trainer = threading.Thread(target=train)
    trainer.start()
    file = upload(jobs)
    faults: list[Exception] = []

    def client(number: int) -> None:
        for i in range(5):
            try:
                job = jobs.create(training_file=file, suffix=f"s-{number}-{i}")
                for change in (jobs.pause, jobs.resume, jobs.cancel)[: 2 + i % 2]:
                    change(job.id)
            except FlextronError as error:
                if "so it cannot be" not in str(error):
                    faults.append(error)
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    wait_until(lambda: not jobs.repository.with_status(Status.VALIDATING, Status.QUEUED, Status.RUNNING), 60)
    is_ending.set()
    trainer.join()
    statuses = [job.status for job in jobs.repository.page(after=None, limit=100)[0]]
    assert len(statuses) == 20
    assert set(statuses) <= {Status.SUCCEEDED, Status.CANCELLED, Status.PAUSED}
    assert not jobs.scheduler._runs
    assert not jobs._preparer.held()

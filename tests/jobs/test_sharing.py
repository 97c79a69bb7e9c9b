"""Several jobs at once, in one thread and from many."""

from __future__ import annotations

import threading
from pathlib import Path

from flextron.errors import FlextronError
from flextron.jobs.driver import TrainingDriver
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import Status
from tests.jobs.making import (
    NUM_STEPS,
    assert_as_alone,
    new_jobs,
    settled,
    step,
    train,
    upload,
)
from tests.server.running import wait_until


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


def test_a_step_that_ends_with_the_driver_is_in_the_books(tmp_path: Path) -> None:
    made = new_jobs(tmp_path / "state")
    job = settled(made)
    driver = TrainingDriver(made)
    driver.start()
    for _ in range(3):
        wait_until(lambda: driver.unit is not None)
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
    assert not any(jobs.scheduler.is_training(job.id) for job in jobs.repository.page(after=None, limit=100)[0])
    assert not jobs.preparer.held()

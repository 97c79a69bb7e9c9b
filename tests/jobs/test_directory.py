"""The state directory: one owner, leftovers, earlier formats, other weights."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flextron.errors import FlextronError
from tests.jobs.making import (
    assert_as_alone,
    new_jobs,
    settled,
    train,
)


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


def test_other_weights_are_refused(tmp_path: Path) -> None:
    new_jobs(tmp_path / "state").close()  # of an earlier version, which asked for no fingerprint
    for _ in range(2):
        new_jobs(tmp_path / "state", fingerprint="these").close()
    with pytest.raises(FlextronError, match=r"is of other weights .* 'tiny' now, .* another one \(--state-directory\)"):
        new_jobs(tmp_path / "state", fingerprint="others")
    new_jobs(tmp_path / "state", fingerprint="these").close()
    new_jobs(tmp_path / "another", fingerprint="others").close()


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
            ("jobs", "spec"),
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

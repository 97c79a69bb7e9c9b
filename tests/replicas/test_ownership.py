"""One owner of a state directory, and adapters that all see."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import flextron
from flextron.errors import FlextronError
from flextron.jobs.jobs import JobsSettings
from flextron.replicas.ownership import SharedAdapters, own
from flextron.replicas.plan import Plan
from flextron.serving.settings import ServerSettings
from tests.jobs.making import RECORDS, jsonl
from tests.server.running import wait_until


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path) -> Plan:
    return Plan(
        directory=str(checkpoint / "model"),
        server=ServerSettings(name="tiny"),
        state_directory=str(tmp_path / "state"),
        jobs=JobsSettings(save_seconds=0),
    )


def test_what_the_owner_makes_all_see(plan: Plan, tmp_path: Path) -> None:
    model, state = flextron.load(plan.directory), tmp_path / "state"
    others = SharedAdapters(state)
    assert others.all() == []
    assert others.get("ft:x") is None
    jobs = own(plan, model)
    assert jobs is not None
    assert own(plan, model) is None
    assert others.all() == []
    file = jobs.uploads.add("a.jsonl", "fine-tune", [jsonl(RECORDS[:4])])
    job = jobs.create(training_file=file.id, suffix="s")
    wait_until(lambda: (run := jobs.scheduler.next()) is not None and _train(jobs, run))
    name = jobs.repository.get(job.id).fine_tuned_model
    assert name is not None
    found = others.get(name)
    assert found is not None
    assert (found.directory / "adapter_model.safetensors").exists()
    # the same object as long as it is the same adapter, by which those in memory are known
    assert others.get(name) is found
    assert [named.name for named in others.all()][-1] == name
    jobs.close()
    again = own(plan, model)
    assert again is not None
    assert others.get(name) is found
    again.delete_adapter(name)
    assert others.get(name) is None
    assert others.all() == [] or name not in [named.name for named in others.all()]
    again.close()


def _train(jobs: object, run: object) -> bool:
    """One step; whether it was the last one."""
    from flextron.jobs.jobs import Jobs
    from flextron.jobs.running_job import RunningJob

    assert isinstance(jobs, Jobs)
    assert isinstance(run, RunningJob)
    metrics = None
    while metrics is None:
        metrics = run.trainer.run(512)
    jobs.scheduler.record(run, metrics)
    return run.trainer.step_number >= run.trainer.num_steps


def test_a_stale_file_is_put_right_by_the_next_owner(plan: Plan, tmp_path: Path) -> None:
    model, state = flextron.load(plan.directory), tmp_path / "state"
    state.mkdir()
    (state / "adapters.json").write_text('{"ft:tiny:gone": {"created_at": 1, "directory": "jobs/x/step-1"}}')
    shared = SharedAdapters(state)
    assert shared.get("ft:tiny:gone") is not None
    jobs = own(plan, model)
    assert jobs is not None
    assert shared.get("ft:tiny:gone") is None
    jobs.close()


def test_a_damaged_file_and_other_weights(plan: Plan, tmp_path: Path, checkpoint: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "adapters.json").write_text('{"ft:x": {"directory": 3}}')
    with pytest.raises(FlextronError, match=r"adapters\.json is malformed"):
        SharedAdapters(state).get("ft:x")
    model = flextron.load(plan.directory)
    jobs = own(plan, model)
    assert jobs is not None
    jobs.close()
    next(model.decoder.parameters()).data += 1
    with pytest.raises(FlextronError, match="other weights"):
        own(plan, model)
    shutil.rmtree(state)

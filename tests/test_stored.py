"""What earlier versions wrote is read by this one, with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import load_file

import flextron
from flextron.checkpoints.peft.reading import read_adapter
from flextron.finetuning.lora import LoraTrainers
from flextron.jobs.records import Status
from flextron.spec import SubnetSpec
from tests.jobs.making import NUM_STEPS, new_jobs, train
from tests.stored.make import HERE, logits

VERSIONS = sorted(path for path in HERE.iterdir() if (path / "specs.json").exists())


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, because some of it is opened for writing."""
    return Path(shutil.copytree(request.param, tmp_path / "stored"))


def test_there_are_some() -> None:
    assert VERSIONS


def test_models_compute_what_they_computed(stored: Path) -> None:
    specs = {name: SubnetSpec.from_dict(spec) for name, spec in json.loads((stored / "specs.json").read_text()).items()}
    expected = load_file(stored / "expected.safetensors")
    models = {
        "checkpoint": flextron.load(stored / "checkpoint"),
        "elastic-adapter": flextron.load(stored / "base", elastic=stored / "elastic-adapter"),
    }
    for kind, model in models.items():
        for name, found in logits(model, specs).items():
            assert torch.allclose(found, expected[f"{kind}.{name}"], atol=1e-5, rtol=1e-4), (kind, name)
    frontier = models["checkpoint"].frontier
    assert frontier is not None
    assert len(frontier.points) >= 2


def test_adapters_have_the_weights_that_peft_reads(stored: Path) -> None:
    decoder = flextron.load(stored / "checkpoint").decoder
    adapter = read_adapter(stored / "adapter", decoder)
    largest = max(float(p.detach().abs().max()) for p in adapter.parameters())
    assert largest == max(float(t.abs().max()) for t in load_peft_weights(str(stored / "adapter")).values())


def test_jobs_go_on(stored: Path) -> None:
    decoder, served = flextron.load(stored / "checkpoint").decoder, []
    jobs = new_jobs(stored / "state", LoraTrainers(decoder, "tiny"), lambda checkpoint, path: served.append(path))
    try:
        (adapter,) = served
        read_adapter(adapter, decoder)
        ((paused, _),) = jobs.repository.with_status(Status.PAUSED)
        assert [step for step, _ in jobs.repository.steps(paused)] == [1]
        jobs.resume(paused)
        jobs.wait_prepared(paused)
        assert train(jobs) == NUM_STEPS - 1
        assert jobs.repository.get(paused).status == Status.SUCCEEDED
    finally:
        jobs.close()

"""`flextron finetune` and the options of `flextron serve` that go with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from openai import OpenAI

from flextron import ElasticModel
from flextron.api.remote import RemoteFinetuning
from flextron.checkpoints.peft.writing import write_adapter
from flextron.errors import FlextronError
from tests.cli import test_cli
from tests.cli.test_cli import assert_refused
from tests.finetuning.lora_maker import LoraMaker
from tests.jobs.making import RECORDS, jsonl
from tests.model.adapter_cases import random_lora
from tests.server.running import wait_until
from tests.server.tuning import Tuning, tuning
from tests.trained import trained_model

run = test_cli.run
SHORT = ("--epochs", 1, "--batch-size", 6, "--rank", 2)


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return trained_model()


@pytest.fixture(scope="module")
def checkpoint(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetune") / "tiny"
    model.save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl(RECORDS))
    return path


@pytest.fixture(scope="module")
def served(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    maker = LoraMaker(model.decoder.config, 0.02)
    with tuning(model, tmp_path_factory.mktemp("served") / "state", maker=maker, api_key="a-key") as made:
        yield made


def test_alone(run: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    outcome = run("finetune", checkpoint, data, "--output", out, *SHORT, "--seed", 3, "--validation", data, "--json")
    assert outcome.code == 0
    figures = json.loads(outcome.out)
    assert (figures["adapter"], figures["num_steps"], len(figures["losses"])) == (str(out), 2, 2)
    assert json.loads((out / "finetuning.json").read_text())["losses"] == figures["losses"]
    assert [v[0] for v in figures["validations"]] == [2]
    assert "finetuning: 2 of 2" in outcome.err
    assert "validation loss" in outcome.err
    assert_refused(run("finetune", checkpoint, data, "--output", out, *SHORT), "exists already", "--restart")
    assert run("finetune", checkpoint, data, "--output", out, *SHORT, "--restart").code == 0


def test_by_a_server(run: Any, served: Tuning, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXTRON_API_KEY", "a-key")
    where = ("finetune", "--server", served.server.url, "--model", "tiny")
    options = ("--suffix", "mine", "--seed", 3, "--checkpoint-every", 1, "--validation", data, "--json")
    outcome = run(*where, data, *SHORT, *options)
    assert outcome.code == 0
    job = json.loads(outcome.out)
    assert (job["status"], job["seed"], job["user_provided_suffix"]) == ("succeeded", 3, "mine")
    assert job["hyperparameters"]["rank"] == 2
    for told in (f"created finetuning job {job['id']}", "2 of 2", "the job has succeeded"):
        assert outcome.err.count(told) == 1
    assert "validation loss" in outcome.err
    client = served.client()
    assert client.files.content(job["validation_file"]).content == data.read_bytes()
    assert client.files.retrieve(job["training_file"]).filename == "train.jsonl"
    assert client.files.content(job["training_file"]).content == data.read_bytes()
    assert client.completions.create(model=job["fine_tuned_model"], prompt="a", max_tokens=2).choices
    again = run("finetune", "--server", served.server.url + "/v1/", "--job", job["id"])
    assert (again.code, again.err.count("the job has succeeded")) == (0, 1)
    assert_refused(run("finetune", "--server", served.server.url, "--job", job["id"], "--cancel"), "is succeeded")


def test_a_failing_job(run: Any, served: Tuning, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    where = ("finetune", "--server", served.server.url, "--model", "tiny", "--api-key", "a-key")
    assert_refused(run(*where, bad), "has failed: line 1 must have")
    assert_refused(run(*where, bad, "--suffix", "a/b"), "suffix")
    assert_refused(run(*where[:4], "other", *where[5:], bad), "no model 'other' to finetune")
    assert_refused(run(*where[:5], bad), "API key")
    assert_refused(run("finetune", "--server", served.server.url, "--api-key", "a-key", "--job", "../x"), "there is no")


def test_more_events_than_a_page(served: Tuning) -> None:
    client = served.client()
    remote = RemoteFinetuning(served.server.url, "a-key")
    file = served.upload(client)
    job = remote.create("tiny", file, suffix=None, seed=1, hyperparameters={"n_epochs": 20, "batch_size": 2})
    events = list(remote.follow(job["id"], 0.1))
    assert [e["data"]["step"] for e in events if e["type"] == "metrics"] == list(range(1, 121))
    assert len({e["id"] for e in events}) == len(events)
    assert list(remote.follow(job["id"])) == events


def test_a_server_that_is_away_for_a_while(served: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFinetuning(served.server.url, "a-key", patience=0.3)
    job = remote.create("tiny", served.upload(served.client()), suffix=None, seed=1, hyperparameters={})
    events = remote.follow(job["id"], 0.05)
    next(events)
    left = [3]

    def away(request: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            request.full_url = "http://127.0.0.1:1/"
        return urlopen(request, **options)

    monkeypatch.setattr("flextron.api.remote.urlopen", away)
    assert list(events)[-1]["message"] == "the job has succeeded"
    left[0] = 1000
    with pytest.raises(FlextronError, match="does not answer"):
        list(remote.follow(job["id"], 0.05))


def test_ctrl_c_leaves_the_job(served: Tuning, data: Path) -> None:
    url = served.server.url
    command = [sys.executable, "-m", "flextron", "finetune", "--server", url, "--model", "tiny", "--epochs", "1000"]
    child = subprocess.Popen(
        [*command, "--api-key", "a-key", str(data)],
        stderr=subprocess.PIPE,
        text=True,
        # a parent in the background ignores it, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with child:
        assert child.stderr is not None
        job_id = next(line.split()[-1] for line in child.stderr if line.startswith("created finetuning job"))
        next(line for line in child.stderr if "1 of" in line)
        child.send_signal(signal.SIGINT)
        said = child.stderr.read().splitlines()[-1]
        assert child.wait(10) == 130
    again = f"flextron finetune --server {url} --job {job_id}"
    assert said == f"the job goes on; watch it again: {again}; end it: {again} --cancel"
    client = served.client()
    assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    client.fine_tuning.jobs.cancel(job_id)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give a checkpoint"),
        (("DIR", "DATA"), "--output"),
        (("DATA", "--output", "OUT"), "give a checkpoint"),
        (("DIR", "DATA", "--output", "OUT", "--suffix", "a"), "give a checkpoint"),
        (("DIR", "DATA", "--server", "http://127.0.0.1:1", "--model", "a"), "give a checkpoint"),
        (("DATA", "--server", "http://127.0.0.1:1"), "--model"),
        (("--server", "http://127.0.0.1:1", "--cancel"), "--job"),
        (("DATA", "--server", "nowhere", "--model", "a"), "is not a URL"),
        (("DATA", "--server", "http://127.0.0.1:1", "--model", "a"), "does not answer"),
        (("DIR/none", "--server", "http://127.0.0.1:1", "--model", "a"), "is not a file"),
        (("DIR/none", "DATA", "--output", "OUT"), "not a directory"),
        (("DIR", "DIR", "--output", "OUT"), "is not a file"),
        (("DIR", "EMPTY", "--output", "OUT"), "has no example"),
        (("DIR", "DATA", "--output", "OUT", "--validation", "DIR"), "is not a file"),
        (("DATA", "--server", "http://127.0.0.1:1", "--model", "a", "--validation", "DIR/none"), "does not answer"),
        (("--server", "http://127.0.0.1:1", "--job", "a", "--validation", "DATA"), "give a checkpoint"),
        (("DIR", "DATA", "--output", "OUT", "--rank", 0), "rank must be"),
        (("DIR", "DATA", "--output", "OUT", "--target-modules", "lm_head"), "target_modules must be"),
        (("DIR", "DATA", "--output", "OUT", "--over-long", "weep"), "over_long must be"),
        (("DIR", "DATA", "--output", "DIR"), "exists already"),
    ],
)
def test_what_cannot_be_done(
    run: Any, checkpoint: Path, data: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    places = {"DIR": checkpoint, "DATA": data, "OUT": tmp_path / "out", "EMPTY": empty}
    given = [places.get(str(o), str(o).replace("DIR/", f"{checkpoint}/")) for o in options]
    outcome = run("finetune", *given)
    assert_refused(outcome, said)
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@contextmanager
def serving(checkpoint: Path, *options: object) -> Iterator[str]:
    """`flextron serve`, stopped as an operator would."""
    sizes = ["--port", "0", "--kv-cache-gb", "0.005"]
    command = [sys.executable, "-m", "flextron", "serve", str(checkpoint), *sizes, *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            line = next(line for line in child.stderr if line.startswith("serving "))
            # the log of requests would fill the pipe
            reader = threading.Thread(target=child.stderr.read, daemon=True)
            reader.start()
            yield line.split()[3]
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) == 0
            reader.join()
        finally:
            child.kill()


@pytest.mark.slow
def test_serving_adapters_and_jobs(run: Any, model: ElasticModel, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    write_adapter(random_lora(model.decoder.config), tmp_path / "lora")
    options = ("--adapter", f"mine={tmp_path / 'lora'}", "--state-directory", tmp_path / "state")
    with serving(checkpoint, *options) as url, OpenAI(base_url=url, api_key="none") as client:
        assert client.completions.create(model="mine@0.6", prompt="a", max_tokens=2).model == "mine@0.6"
        file = client.files.create(file=data, purpose="fine-tune")
        jobs = client.fine_tuning.jobs
        job = jobs.create(model="tiny", training_file=file.id, hyperparameters={"n_epochs": 40, "batch_size": 4})
        wait_until(lambda: (jobs.retrieve(job.id).trained_tokens or 0) > 0, 60)
        refused = run("serve", checkpoint, "--port", 0, "--state-directory", tmp_path / "state")
        assert_refused(refused, "is in use by another process")
    other = run("serve", checkpoint, "--port", 0, "--name", "other", "--state-directory", tmp_path / "state")
    assert_refused(other, "is of the model 'tiny'")
    changed = trained_model()
    with torch.no_grad():
        changed.decoder.layers[2].mlp.down.weight[5] += 0.1
    changed.save(tmp_path / "tiny")
    refused = run("serve", tmp_path / "tiny", "--port", 0, "--state-directory", tmp_path / "state")
    assert_refused(refused, "is of other weights", "--state-directory")
    with serving(checkpoint, *options) as url, OpenAI(base_url=url, api_key="none") as client:
        jobs = client.fine_tuning.jobs
        wait_until(lambda: jobs.retrieve(job.id).status == "succeeded", 100)
        name = jobs.retrieve(job.id).fine_tuned_model
        assert name is not None
        assert client.completions.create(model=name, prompt="a", max_tokens=2).model == name
        told = [event.message for event in jobs.list_events(job.id, limit=100)]
        assert [message for message in told if message.startswith("resumed after step")]
        assert len([message for message in told if message.startswith("step ")]) == 120


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--adapter", "lora"), "NAME=DIRECTORY"),
        (("--adapter", "lora="), "NAME=DIRECTORY"),
        (("--adapter", "lora=nowhere"), "does not exist"),
        (("--adapter", "=DIR"), "must be a word"),
        (("--adapter", "ft:a=DIR"), "begins with ft:"),
        (("--max-loaded-adapters", 0), "max_loaded_adapters"),
        (("--max-training", 0), "max_training"),
        (("--state-directory", "FILE"), "cannot be used"),
    ],
)
def test_what_cannot_be_served(run: Any, checkpoint: Path, data: Path, options: tuple[object, ...], said: str) -> None:
    given = [str(o).replace("DIR", str(checkpoint)).replace("FILE", str(data)) for o in options]
    assert_refused(run("serve", checkpoint, "--port", 0, *given), said)

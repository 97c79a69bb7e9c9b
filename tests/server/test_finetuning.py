"""`/v1/fine_tuning/jobs`, driven by OpenAI's client."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file

from flextron import ElasticModel, Target, finetune
from flextron.checkpoints.peft.reading import read_adapter
from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainer, LoraTrainers
from flextron.finetuning.trainer import TrainingTask
from tests.finetuning.bigram import BigramMaker, is_whole
from tests.jobs.making import RECORDS, jsonl
from tests.jobs.scoring import score
from tests.server.test_openapi import check_operations
from tests.server.test_refusals import assert_refused
from tests.server.tuning import CHAT, Tuning, tuning

SHORT: Any = {"n_epochs": 2, "batch_size": 3}
LONG: Any = {"n_epochs": 1000, "batch_size": 1}


@pytest.fixture(scope="module")
def served(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    with tuning(model, tmp_path_factory.mktemp("jobs") / "state", seconds=0.01) as made:
        yield made


def test_from_upload_to_adapter(served: Tuning) -> None:
    client, tuning = served.client(), served.client().fine_tuning.jobs
    file = client.files.create(file=("chat.jsonl", jsonl(CHAT)), purpose="fine-tune")
    job = tuning.create(
        model="tiny",
        training_file=file.id,
        suffix="words",
        seed=7,
        metadata={"for": "a test"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 2, "checkpoint_every": 4}},  # type: ignore[typeddict-unknown-key]
        },
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "tiny", 7)
    assert (job.fine_tuned_model, job.finished_at, job.result_files, job.error) == (None, None, [], None)
    assert (job.training_file, job.metadata) == (file.id, {"for": "a test"})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (3, 1.0)
    done = served.wait(client, job.id, "succeeded")
    assert done.fine_tuned_model == f"ft:tiny:flextron:words:{job.id[-8:]}"
    assert done.finished_at >= done.created_at
    # 5 examples, 2 a step, 3 epochs
    events = list(tuning.list_events(job.id, limit=4))
    metrics = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(9, 0, -1))  # type: ignore[index]
    assert all(event.level == "info" and event.object == "fine_tuning.job.event" for event in events)
    assert (events[0].message, events[-1].message) == ("the job has succeeded", f"created finetuning job {job.id}")
    (result,) = done.result_files
    assert client.files.retrieve(result).purpose == "fine-tune-results"
    rows = list(csv.DictReader(client.files.content(result).text.splitlines()))
    assert [float(row["train_loss"]) for row in rows] == [e.data["train_loss"] for e in reversed(metrics)]  # type: ignore[index]
    assert done.trained_tokens == sum(int(row["num_tokens"]) for row in rows)
    checkpoints = list(tuning.checkpoints.list(job.id, limit=2))
    assert [c.step_number for c in checkpoints] == [9, 8, 4]
    names = [c.fine_tuned_model_checkpoint for c in checkpoints]
    assert names == [done.fine_tuned_model, *(f"{done.fine_tuned_model}:ckpt-step-{n}" for n in (8, 4))]
    assert [c.metrics.train_loss for c in checkpoints] == [
        float(rows[c.step_number - 1]["train_loss"]) for c in checkpoints
    ]
    told = {checkpoint.name: (checkpoint, directory) for checkpoint, directory in served.adapters}
    assert all(is_whole(told[name][1], told[name][0].step) for name in names)


def test_validation(model: ElasticModel, tmp_path: Path) -> None:
    """A real adapter: what OpenAI's client shows is what the adapter's file gives by the textbook."""
    held_out = RECORDS[::3]
    with tuning(model, tmp_path / "state", maker=LoraTrainers(model.decoder, "tiny")) as served:
        client, tuned = served.client(), served.client().fine_tuning.jobs
        job = tuned.create(
            model="tiny",
            training_file=served.upload(client),
            validation_file=(validation := served.upload(client, held_out)),
            seed=3,
            hyperparameters=SHORT | {"checkpoint_every": 3, "learning_rate": 1e-2},
        )
        assert job.validation_file == validation
        done = served.wait(client, job.id, "succeeded")
        assert done.validation_file == validation
        rows = list(csv.DictReader(client.files.content(done.result_files[0]).text.splitlines()))
        assert [int(row["step"]) for row in rows if row["valid_loss"]] == [3, 4, 6, 8]
        events = {e.data["step"]: e.data for e in tuned.list_events(job.id) if e.type == "metrics"}  # type: ignore[index]
        (tmp_path / "valid").write_bytes(jsonl(held_out))
        assert model.tokenizer is not None
        examples = read_dataset(tmp_path / "valid", model.tokenizer, Hyperparameters(), 128).examples
        directories = {checkpoint.step: directory for checkpoint, directory in served.adapters}
        checkpoints = list(tuned.checkpoints.list(job.id))
        assert sorted(c.step_number for c in checkpoints) == [3, 6, 8]
        for checkpoint in checkpoints:
            step = checkpoint.step_number
            loss, accuracy = score(model.decoder, read_adapter(directories[step], model.decoder), examples)
            metrics = checkpoint.metrics
            assert metrics.valid_loss == metrics.full_valid_loss == events[step]["valid_loss"]
            assert metrics.valid_mean_token_accuracy == metrics.full_valid_mean_token_accuracy
            assert metrics.full_valid_loss == pytest.approx(loss, abs=1e-4)
            assert metrics.full_valid_mean_token_accuracy == pytest.approx(accuracy)
            assert float(rows[step - 1]["valid_loss"]) == events[step]["full_valid_loss"]
        assert "full_valid_loss" not in events[1]


@pytest.mark.parametrize("body", [{"model": "tiny@0.6"}, {"flextron": {"latency": 0.6}}])
def test_at_a_target(model: ElasticModel, tmp_path: Path, body: dict[str, Any]) -> None:
    """The same adapter as is made at this target without a server, also after a restart."""
    (tmp_path / "data.jsonl").write_bytes(jsonl(RECORDS))
    target = Target(latency=0.6)
    alone = finetune(model, tmp_path / "data.jsonl", tmp_path / "alone", target=target, seed=3, **SHORT)
    maker = LoraTrainers(model.decoder, "tiny")
    with tuning(model, tmp_path / "state", maker=maker) as served:
        client = served.client()
        created = httpx.post(
            f"{served.server.url}/v1/fine_tuning/jobs",
            json={"model": "tiny", "training_file": served.upload(client), "seed": 3, "hyperparameters": SHORT} | body,
        ).json()
        assert (created["model"], created["flextron"]) == ("tiny", {"spec": model.select(latency=0.6).to_dict()})
        client.fine_tuning.jobs.pause(created["id"])
    with tuning(model, tmp_path / "state", maker=maker) as served:
        client = served.client()
        client.fine_tuning.jobs.resume(created["id"])
        served.wait(client, created["id"], "succeeded")
        ((_, directory),) = served.adapters
        made, wanted = (load_file(path / "adapter_model.safetensors") for path in (directory, alone.adapter))
        for name, tensor in wanted.items():
            # a server sizes units by the time they have, which changes the order of sums
            assert torch.allclose(made[name], tensor, rtol=1e-3, atol=1e-5), name


def test_bad_validation_files_fail_the_job(served: Tuning) -> None:
    client = served.client()
    files = {"training_file": served.upload(client), "validation_file": served.upload(client, [*RECORDS, {"a": 1}])}
    job = client.fine_tuning.jobs.create(model="tiny", **files)
    failed = served.wait(client, job.id, "failed")
    assert (failed.error.code, failed.error.param) == ("invalid_validation_file", "validation_file")
    assert failed.error.message.startswith("line 13 has neither")


def test_pause_resume_and_cancel(served: Tuning) -> None:
    client, tuning = served.client(), served.client().fine_tuning.jobs
    job = tuning.create(model="tiny", training_file=served.upload(client), hyperparameters=LONG)
    served.wait(client, job.id, "running")
    assert tuning.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    with pytest.raises(openai.BadRequestError, match="is paused, so it cannot be paused"):
        tuning.pause(job.id)
    assert tuning.resume(job.id).status == "queued"
    assert served.wait(client, job.id, "running").estimated_finish is not None
    assert tuning.cancel(job.id).status == "cancelled"
    for change in (tuning.cancel, tuning.pause, tuning.resume):
        with pytest.raises(openai.BadRequestError, match="is cancelled, so it cannot be"):
            change(job.id)
    texts = [event.message for event in tuning.list_events(job.id) if event.type == "message"][::-1]
    assert [text for text in texts if text.startswith("the job")] == [
        "the job was paused",
        "the job goes on",
        "the job was cancelled",
    ]


def test_pages(model: ElasticModel, tmp_path: Path) -> None:
    with tuning(model, tmp_path / "state") as made:
        client, jobs = made.client(), made.client().fine_tuning.jobs
        file = made.upload(client)
        ids = [jobs.create(model="tiny", training_file=file, hyperparameters=SHORT).id for _ in range(5)]
        assert [job.id for job in jobs.list(limit=2)] == ids[::-1]
        assert [job.id for job in jobs.list(after=ids[2])] == ids[1::-1]
        url = f"{made.server.url}/v1/fine_tuning/jobs"
        for path in ("", f"/{ids[0]}/events", f"/{ids[0]}/checkpoints"):
            for query in ("limit=0", "limit=101", "limit=a"):
                assert_refused(httpx.get(f"{url}{path}?{query}"), 400, "limit")
            assert_refused(httpx.get(f"{url}{path}?after=ft-nothing"), 404, "ft-nothing")
        assert_refused(httpx.get(f"{url}?metadata[a]=b"), 400, "metadata")


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"model": "other@0.6"}, 404, "model"),
        ({"model": "tiny@0.01"}, 400, "model"),
        ({"flextron": {"latency": 0.01}}, 400, "flextron"),
        ({"model": "tiny@0.6", "flextron": {"latency": 0.7}}, 400, "flextron"),
        ({"flextron": {"latency": 0.6, "router": "token"}}, 400, "flextron"),
        ({"flextron": {"latency": 0.6, "min_latency_target": 0.5}}, 400, "flextron"),
        ({"training_file": "file-nothing"}, 400, None),
        ({"training_file": "../lock"}, 400, None),
        ({"training_file": 3}, 400, "training_file"),
        ({"suffix": "a/b"}, 400, "suffix"),
        ({"suffix": ".."}, 400, "suffix"),
        ({"suffix": "a:b"}, 400, "suffix"),
        ({"suffix": "a" * 65}, 400, "suffix"),
        ({"suffix": "a\n"}, 400, "suffix"),
        ({"suffix": ""}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**31}, 400, "seed"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {str(i): "a" for i in range(17)}}, 400, "metadata"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, None),
        ({"hyperparameters": {"optimizer": "sgd"}}, 400, None),
        ({"hyperparameters": {"max_tokens": 10_000}}, 400, None),
        ({"hyperparameters": [1]}, 400, "hyperparameters"),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"rank": 1}}}}, 400, "hyperparameters"),
        ({"validation_file": "file-a"}, 400, None),
        ({"validation_file": "../lock"}, 400, None),
        ({"validation_file": 3}, 400, "validation_file"),
        ({"integrations": [{"type": "wandb"}]}, 400, None),
    ],
)
def test_bad_jobs_are_refused(served: Tuning, changes: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": "tiny", "training_file": served.upload(served.client()), "hyperparameters": SHORT} | changes
    answer = httpx.post(f"{served.server.url}/v1/fine_tuning/jobs", json=body)
    error = assert_refused(answer, status)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert str(error["param"]).startswith(param)


def test_a_suffix_is_taken_once(served: Tuning) -> None:
    client, tuning = served.client(), served.client().fine_tuning.jobs
    options: Any = {"model": "tiny", "training_file": served.upload(client), "suffix": "mine", "hyperparameters": SHORT}
    first = tuning.create(**options)
    with pytest.raises(openai.BadRequestError, match="another job has the suffix 'mine'"):
        tuning.create(**options)
    served.wait(client, first.id, "succeeded")
    with pytest.raises(openai.BadRequestError, match="another job has the suffix 'mine'"):
        tuning.create(**options)


@pytest.mark.parametrize(
    ("content", "chosen", "said"),
    [
        (b"", {}, "no example"),
        (jsonl(RECORDS) + b'{"prompt"\n', {}, "line 13 is not valid JSON"),
        (jsonl([{"messages": [{"role": "robot", "content": "a"}]}]), {}, "line 1 has a message 0 whose role"),
        (jsonl([{"prompt": "a b " * 100, "completion": "c"}]), {"over_long": "refuse"}, "line 1 has "),
    ],
)
def test_bad_files_fail_the_job(served: Tuning, content: bytes, chosen: Any, said: str) -> None:
    client = served.client()
    file = client.files.create(file=("bad.jsonl", content), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=chosen)
    failed = served.wait(client, job.id, "failed")
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert said in failed.error.message
    assert failed.finished_at is not None


def test_a_diverging_job_fails_and_serving_goes_on(served: Tuning) -> None:
    client = served.client()
    chosen: Any = {"n_epochs": 50, "learning_rate_multiplier": 1e6}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=served.upload(client), hyperparameters=chosen)
    assert "the training loss became" in served.wait(client, job.id, "failed").error.message
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


class Poisoned(LoraTrainers):
    """Adapters of rank 1 are no numbers."""

    def __call__(self, task: TrainingTask) -> LoraTrainer:
        made = super().__call__(task)
        if task.hyperparameters.rank != 1:
            return made
        with torch.no_grad():
            next(iter(made.adapter.parameters())).fill_(math.nan)
        with TemporaryDirectory() as state:
            made.save_state(Path(state))
            return super().__call__(replace(task, resume=Path(state)))


def test_a_real_adapter_that_diverges(model: ElasticModel, tmp_path: Path) -> None:
    ask: Any = {"model": "tiny", "prompt": "The city was", "max_tokens": 12, "temperature": 0}
    with tuning(model, tmp_path / "state", maker=Poisoned(model.decoder, "tiny")) as served:
        client = served.client()
        before, file = client.completions.create(**ask).choices[0].text, served.upload(client)
        options: Any = {"model": "tiny", "training_file": file}
        job = client.fine_tuning.jobs.create(**options, hyperparameters=SHORT | {"rank": 1})
        failed = served.wait(client, job.id, "failed")
        assert failed.error.code == "training_failed"
        assert re.match(r"the gradients .* became nan at step 1; lower learning_rate", failed.error.message)
        assert client.completions.create(**ask).choices[0].text == before
        after = client.fine_tuning.jobs.create(**options, hyperparameters=SHORT)
        served.wait(client, after.id, "succeeded")


def test_an_example_that_is_too_long_is_cut_and_that_is_said(served: Tuning) -> None:
    client = served.client()
    file = served.upload(client, [*RECORDS, {"prompt": "a ", "completion": "b " * 200}])
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=SHORT)
    served.wait(client, job.id, "succeeded")
    told = {e.message: e.level for e in client.fine_tuning.jobs.list_events(job.id)}
    assert told["1 examples were cut to the allowed length"] == "warn"


def test_files_of_running_jobs_stay(served: Tuning) -> None:
    client = served.client()
    file = served.upload(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters=LONG)
    with pytest.raises(openai.BadRequestError, match="needs this file"):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted


@pytest.mark.parametrize("job_id", ["nothing", "..%2f..", "ftjob-%00", "a" * 3000])
def test_ids_lead_nowhere(served: Tuning, job_id: str) -> None:
    with httpx.Client(base_url=f"{served.server.url}/v1/fine_tuning/jobs/") as client:
        for path in (job_id, f"{job_id}/events", f"{job_id}/checkpoints"):
            assert client.get(path).status_code == 404
        for path in ("cancel", "pause", "resume"):
            assert client.post(f"{job_id}/{path}").status_code == 404


def test_a_full_disk_is_told(served: Tuning) -> None:
    client = served.client()
    job = client.fine_tuning.jobs.create(model="tiny", training_file=served.upload(client), hyperparameters=LONG)
    served.wait(client, job.id, "running")
    assert isinstance(served.maker, BigramMaker)
    served.maker.disk_is_full.set()
    try:
        served.wait(client, job.id, "paused")
    finally:
        served.maker.disk_is_full.clear()
    newest = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert (newest.level, "no space is left" in newest.message) == ("error", True)
    client.fine_tuning.jobs.resume(job.id)
    served.wait(client, job.id, "running")
    client.fine_tuning.jobs.cancel(job.id)


def test_a_restart_goes_on(model: ElasticModel, tmp_path: Path) -> None:
    with tuning(model, tmp_path / "state", seconds=0.02) as made:
        client = made.client()
        job = client.fine_tuning.jobs.create(model="tiny", training_file=made.upload(client), hyperparameters=SHORT)
        made.wait(client, job.id, "running")
    with tuning(model, tmp_path / "state") as made:
        client = made.client()
        assert made.wait(client, job.id, "succeeded").id == job.id
        steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id) if e.type == "metrics"]  # type: ignore[index]
        assert steps == list(range(8, 0, -1))


def test_the_document_holds(served: Tuning) -> None:
    assert check_operations(served.server, 10) == 30

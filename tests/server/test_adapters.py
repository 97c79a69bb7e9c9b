"""Adapters over HTTP: `ft:` names of jobs and names of the operator, against models with the adapter merged in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

import flextron
from flextron import ElasticModel, FlextronError
from flextron.checkpoints.peft.writing import write_adapter
from flextron.finetuning.lora import LoraTrainers
from flextron.jobs.records import JobCheckpoint
from flextron.model.adapter import Adapter
from flextron.serving.adapters import AdapterNames, LoadedAdapters, NamedAdapter, adapter_reader
from flextron.serving.errors import ApiError
from tests.finetuning.lora_maker import LoraMaker
from tests.model.adapter_cases import merged, random_ia3, random_lora
from tests.server.running import running, wait_until
from tests.server.test_refusals import assert_refused
from tests.server.tuning import CHAT, Tuning, chat_model, tuning
from tests.trained import trained_model

PROMPT = "The city was"
CHOSEN: Any = {"n_epochs": 2, "batch_size": 2, "checkpoint_every": 2}
"""Of five examples: six steps."""


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return chat_model(trained_model())


@pytest.fixture(scope="module")
def served(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    state = tmp_path_factory.mktemp("adapters") / "state"
    with tuning(model, state, maker=LoraMaker(model.decoder.config), max_loaded_adapters=2) as made:
        yield made


def finished(served: Tuning, client: OpenAI, seed: int) -> Any:
    """A job that has succeeded."""
    file = served.upload(client, CHAT)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=seed, hyperparameters=CHOSEN)
    return served.wait(client, job.id, "succeeded")


def expected(model: ElasticModel, adapter: Adapter, latency: float | None = None) -> str:
    spec = model.space.full if latency is None else model.select(latency=latency)
    return replace(model, decoder=merged(model.decoder, adapter)).generate(PROMPT, spec=spec, max_tokens=12)


def complete(client: OpenAI, name: str, **options: Any) -> Any:
    return client.completions.create(**{"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options})


def test_from_upload_to_an_answer_in_the_adapter(served: Tuning, model: ElasticModel) -> None:
    client, maker = served.client(), served.maker
    assert isinstance(maker, LoraMaker)
    job = finished(served, client, seed=1)
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [6, 4, 2]
    for checkpoint in checkpoints:
        name = checkpoint.fine_tuned_model_checkpoint
        adapter = maker.adapter(1, checkpoint.step_number)
        for latency in (None, 0.6):
            answer = complete(client, name if latency is None else f"{name}@{latency}")
            assert answer.choices[0].text == expected(model, adapter, latency)
            spec = model.space.full if latency is None else model.select(latency=latency)
            assert answer.flextron["adapter"] == name
            assert answer.flextron["spec"] == spec.to_dict()
        body = complete(client, name, extra_body={"flextron": {"latency": 0.6}})
        assert body.choices[0].text == answer.choices[0].text
    # without it all is as before
    plain = complete(client, "tiny")
    assert plain.choices[0].text == model.generate(PROMPT, max_tokens=12)
    assert plain.flextron["adapter"] is None
    stream = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "Say yes"}], max_tokens=4, stream=True
    )
    first = next(stream)
    assert (first.model, first.flextron["adapter"]) == (job.fine_tuned_model, job.fine_tuned_model)  # type: ignore[attr-defined]
    assert sum(len(chunk.choices) for chunk in stream) > 1


CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}


def test_what_was_learnt_is_answered(model: ElasticModel, tmp_path: Path) -> None:
    records = [{"prompt": f"The capital of {a} is", "completion": f" {b}"} for a, b in CAPITALS.items()]
    trainers = LoraTrainers(model.decoder, "tiny")
    with tuning(model, tmp_path / "state", maker=trainers) as made:
        client = made.client()
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=made.upload(client, records),
            seed=0,
            hyperparameters={"n_epochs": 40, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 10},  # type: ignore[typeddict-unknown-key]
        )
        trained = made.wait(client, job.id, "succeeded")
        name = trained.fine_tuned_model
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
        assert [c.step_number for c in checkpoints] == [40, 30, 20, 10]
        assert checkpoints[0].metrics.train_loss < 0.2 < checkpoints[-1].metrics.train_loss  # type: ignore[operator]
        assert (
            f'flextron:trained_tokens_total{{model_name="tiny"}} {trained.trained_tokens:.1f}\n'
            in httpx.get(f"{made.server.url}/metrics").text
        )
        prompts = [record["prompt"] for record in records]
        answers = complete(client, name, prompt=prompts).choices
        assert [answer.text for answer in answers] == [f" {b}" for b in CAPITALS.values()]
        assert {answer.finish_reason for answer in answers} == {"stop"}
        wanted = flextron.Engine(model, kv_cache_gb=0.005).generate(
            prompts,
            flextron.SamplingParams(max_tokens=12),
            adapter=next(path for checkpoint, path in made.adapters if checkpoint.name == name),
        )
        assert [answer.text for answer in answers] == [answer.text for answer in wanted]
        without = complete(client, "tiny", prompt=prompts).choices
        assert not {answer.text for answer in without} & {answer.text for answer in answers}


def test_adapters_are_listed(served: Tuning) -> None:
    client = served.client()
    job = finished(served, client, seed=2)
    listed = {m.id: m for m in client.models.list()}
    for name in (job.fine_tuned_model, f"{job.fine_tuned_model}:ckpt-step-2"):
        card: Any = client.models.retrieve(name)
        assert card == listed[name]
        assert (card.parent, card.owned_by, card.flextron["adapter"]) == ("tiny", "flextron", name)
        assert job.created_at <= card.created <= job.finished_at
        assert client.models.retrieve(f"{name}@0.6").flextron["target"] == {"latency": 0.6}  # type: ignore[attr-defined]
    for unknown in (f"{job.fine_tuned_model}:ckpt-step-3", f"{job.fine_tuned_model}@x", "ft:tiny:flextron::", "ft:"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(unknown)
        with pytest.raises(openai.NotFoundError):
            complete(client, unknown)


def test_a_token_router_is_refused_beside_an_adapted_mlp(served: Tuning, model: ElasticModel) -> None:
    assert model.token_router is not None
    client = served.client()
    name = finished(served, client, seed=3).fine_tuned_model
    body = {"flextron": {"latency": next(iter(model.token_router.specs)), "router": "token"}}
    with pytest.raises(openai.BadRequestError, match="adapter of MLP linears cannot run beside a token router"):
        complete(client, name, extra_body=body)
    assert complete(client, "tiny", extra_body=body).flextron["target"]["router"] == "token"


def test_deletion(served: Tuning) -> None:
    client = served.client()
    job = finished(served, client, seed=4)
    name = job.fine_tuned_model
    assert complete(client, name).flextron["adapter"] == name
    directory = next(path for checkpoint, path in served.adapters if checkpoint.name == name)
    assert directory.exists()
    gone: Any = client.models.delete(name)
    assert gone.model_dump() == {"id": name, "object": "model", "deleted": True}
    assert not directory.exists()
    assert name not in served.server.service.adapters.names
    assert name not in {m.id for m in client.models.list()}
    for use in (client.models.delete, client.models.retrieve, lambda n: complete(client, n)):
        with pytest.raises(openai.NotFoundError):
            use(name)
    left = [c.fine_tuned_model_checkpoint for c in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert left == [f"{name}:ckpt-step-4", f"{name}:ckpt-step-2"]
    assert complete(client, left[0]).flextron["adapter"] == left[0]
    assert client.fine_tuning.jobs.list_events(job.id).data[0].message == f"deleted adapter: {name}"
    client.models.delete(left[0])
    for other in ("tiny", "tiny@0.6"):
        with pytest.raises(openai.BadRequestError, match="cannot be deleted"):
            client.models.delete(other)


def test_requests_in_flight_outlive_their_adapter(served: Tuning, model: ElasticModel) -> None:
    client, maker = served.client(), served.maker
    assert isinstance(maker, LoraMaker)
    name = finished(served, client, seed=5).fine_tuned_model
    stream = complete(client, name, max_tokens=40, extra_body={"ignore_eos": True}, stream=True)
    text = next(stream).choices[0].text
    client.models.delete(name)
    text += "".join(chunk.choices[0].text for chunk in stream)
    whole = replace(model, decoder=merged(model.decoder, maker.adapter(5, 6)))
    assert text.startswith(whole.generate(PROMPT, max_tokens=12))
    wait_until(lambda: name not in served.server.service.adapters.names)


@pytest.mark.parametrize(
    "name",
    [
        "ft:../../lock",
        "ft:tiny:flextron::../state.sqlite",
        "../state.sqlite",
        "..%2f..%2fstate.sqlite",
        "/etc/passwd",
        "ft:tiny\0",
        "'; DROP TABLE checkpoints; --",
    ],
)
def test_names_are_no_paths(served: Tuning, name: str) -> None:
    if not (before := served.jobs.repository.all_checkpoints()):
        finished(served, served.client(), seed=8)
        before = served.jobs.repository.all_checkpoints()
    url = f"{served.server.url}/v1/models/{httpx.QueryParams({'a': name})}".replace("/a=", "/")
    for method in ("GET", "DELETE"):
        assert_refused(httpx.request(method, url), 404)
    body = {"model": name, "prompt": "a", "max_tokens": 1}
    assert_refused(httpx.post(f"{served.server.url}/v1/completions", json=body), 404)
    assert served.jobs.repository.all_checkpoints() == before != []


def test_a_restart_finds_what_was_not_deleted(model: ElasticModel, tmp_path: Path) -> None:
    maker = LoraMaker(model.decoder.config)
    with tuning(model, tmp_path / "state", maker=maker) as made:
        client = made.client()
        job = finished(made, client, seed=6)
        client.models.delete(f"{job.fine_tuned_model}:ckpt-step-2")
    left = tmp_path / "state" / "jobs" / job.id / "step-2"
    left.mkdir()  # as if the server had been killed in between
    with tuning(model, tmp_path / "state", maker=maker) as made:
        client = made.client()
        names = [m.id for m in client.models.list() if m.id.startswith("ft:")]
        assert names == [f"{job.fine_tuned_model}:ckpt-step-4", job.fine_tuned_model]
        assert complete(client, job.fine_tuned_model).choices[0].text == expected(model, maker.adapter(6, 6))
        assert not left.exists()


def test_a_damaged_adapter_is_refused_alone(served: Tuning) -> None:
    client = served.client()
    name = finished(served, client, seed=7).fine_tuned_model
    directory = next(path for checkpoint, path in served.adapters if checkpoint.name == name)
    (directory / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(openai.BadRequestError, match="cannot be read") as refused:
        complete(client, name)
    assert str(directory) not in refused.value.message
    assert complete(client, "tiny").choices


def test_adapters_of_the_operator(model: ElasticModel, tmp_path: Path) -> None:
    config = model.decoder.config
    adapters, names = {"lora": random_lora(config, seed=8), "ia3": random_ia3(config, seed=9)}, AdapterNames()
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name)
        names.add(name, tmp_path / name, adapter_reader(model.decoder))
    with running(model, adapters=names) as made:
        client = made.client()
        for name, adapter in adapters.items():
            assert complete(client, name).choices[0].text == expected(model, adapter)
            assert complete(client, f"{name}@0.6").choices[0].text == expected(model, adapter, 0.6)
        assert [m.id for m in client.models.list()][-2:] == ["lora", "ia3"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "must be a word"),
        ("a@0.6", "must be a word"),
        ("a b", "must be a word"),
        ("ft:mine", "begins with ft:"),
        ("twice", "two adapters"),
    ],
)
def test_bad_names_of_the_operator(model: ElasticModel, tmp_path: Path, name: str, said: str) -> None:
    write_adapter(random_lora(model.decoder.config), tmp_path / "lora")
    names, read = AdapterNames(), adapter_reader(model.decoder)
    names.add("twice", tmp_path / "lora", read)
    with pytest.raises(FlextronError, match=said):
        names.add(name, tmp_path / "lora", read)
    with pytest.raises(FlextronError, match="does not exist"):
        names.add("other", tmp_path, read)
    names.add("tiny", tmp_path / "lora", read)
    with pytest.raises(FlextronError, match="both called 'tiny'"), running(model, adapters=names):
        pass


# in memory


def named(names: AdapterNames, number: int) -> NamedAdapter:
    checkpoint = JobCheckpoint(
        id=f"ftckpt-{number}", created_at=0, job_id="a", step=number, name=f"ft:{number}", loss=0.0, accuracy=None
    )
    names.add_checkpoint(checkpoint, Path(str(number)))
    found = names.get(checkpoint.name)
    assert found is not None
    return found


class Reader:
    """Reads nothing, and counts."""

    def __init__(self, model: ElasticModel) -> None:
        self.read: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._config = model.decoder.config

    def __call__(self, directory: Path) -> Adapter:
        self.may_go_on.wait(10)
        self.read.append(str(directory))
        if str(directory) == "13":
            raise FlextronError("unlucky")
        return random_lora(self._config, rank=1, targets=("q",))


def test_the_one_used_least_recently_leaves(model: ElasticModel) -> None:
    async def check() -> None:
        names, reader, dropped = AdapterNames(), Reader(model), []
        loaded = LoadedAdapters(names, reader, 2, dropped.append)
        one, two, three = (named(names, n) for n in (1, 2, 3))
        first = await loaded.acquire(one)
        loaded.release(one)
        await loaded.acquire(two)
        loaded.release(two)
        assert await loaded.acquire(one) is first
        await loaded.acquire(three)
        assert (loaded.names, reader.read, len(dropped)) == (["ft:1", "ft:3"], ["1", "2", "3"], 1)
        with pytest.raises(ApiError) as refused:
            await loaded.acquire(two)
        assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})
        loaded.release(three)
        await loaded.acquire(two)
        assert loaded.names == ["ft:1", "ft:2"]
        loaded.close()

    asyncio.run(check())


def test_many_wait_for_one_reading(model: ElasticModel) -> None:
    async def check() -> None:
        names, reader = AdapterNames(), Reader(model)
        loaded = LoadedAdapters(names, reader, 1)
        one = named(names, 1)
        reader.may_go_on.clear()
        waiting = [asyncio.ensure_future(loaded.acquire(one)) for _ in range(5)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        reader.may_go_on.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert len({id(r) for r in results[1:]}) == 1
        assert reader.read == ["1"]
        for _ in range(4):
            loaded.release(one)
        await loaded.acquire(named(names, 2))
        loaded.close()

    asyncio.run(check())


def test_what_cannot_be_read_is_tried_again(model: ElasticModel) -> None:
    async def check() -> None:
        names, reader = AdapterNames(), Reader(model)
        loaded = LoadedAdapters(names, reader, 1)
        bad = named(names, 13)
        for _ in range(2):
            results = await asyncio.gather(*(loaded.acquire(bad) for _ in range(3)), return_exceptions=True)
            assert [r.status for r in results if isinstance(r, ApiError)] == [400] * 3
        assert (reader.read, loaded.names) == (["13", "13"], [])
        names.remove_checkpoint(
            JobCheckpoint(id="", created_at=0, job_id="", step=13, name="ft:13", loss=0, accuracy=0)
        )
        with pytest.raises(ApiError) as refused:
            await loaded.acquire(bad)
        assert refused.value.status == 404
        loaded.close()

    asyncio.run(check())

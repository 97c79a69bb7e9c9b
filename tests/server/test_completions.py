"""`/v1/completions` through OpenAI's own client, against generation without a server."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from torch import Tensor

from flextron import ElasticModel, Engine, SamplingParams, SubnetSpec, Target
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.routing.token_router import PricedRouter
from tests.server.running import Running

PROMPTS = ["The city was", "In 1998", "Once upon a time there", "a"]


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return server.client()


def complete(client: OpenAI, prompt: Any = "The city was", model: str = "tiny", **options: Any) -> Any:
    values = {"max_tokens": 24, "temperature": 0, **options}
    return client.completions.create(model=model, prompt=prompt, **values)


def test_models_are_listed_with_their_sub_networks(client: OpenAI) -> None:
    models = {m.id: m for m in client.models.list()}
    assert list(models) == ["tiny", "tiny@1", "tiny@0.8", "tiny@0.6", "tiny@0.5"]
    assert [m.parent for m in models.values()] == [None, *["tiny"] * 4]  # type: ignore[attr-defined]
    for name in models:
        one: Any = client.models.retrieve(name)
        assert one == models[name]
        assert complete(client, model=name, max_tokens=1).flextron["spec"] == one.flextron["spec"]
    assert client.models.retrieve("tiny@0.71").id == "tiny@0.71"
    for unknown in ("other", "tiny@", "tiny@x", "tiny@0.1", "tiny@nan", "tiny@0.6@0.6"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(unknown)
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("latency", [None, 0.8, 0.5])
def test_answers_are_those_without_a_server(client: OpenAI, model: ElasticModel, latency: float | None) -> None:
    spec = model.space.full if latency is None else model.select(latency=latency)
    named = complete(client, model="tiny" if latency is None else f"tiny@{latency}")
    body = {} if latency is None else {"flextron": {"latency": latency}}
    asked = complete(client, extra_body=body)
    wanted = model.generate("The city was", spec=spec, max_tokens=24)
    assert named.choices[0].text == asked.choices[0].text == wanted
    assert named.flextron == asked.flextron
    assert named.flextron["spec"] == spec.to_dict()
    assert named.flextron["params"] == model.num_parameters(spec)
    assert named.flextron["target"] == (None if latency is None else {"latency": latency})
    assert named.model == ("tiny" if latency is None else f"tiny@{latency}")
    assert named.choices[0].finish_reason == "length"
    assert (named.usage.prompt_tokens, named.usage.completion_tokens, named.usage.total_tokens) == (4, 24, 28)


def test_every_kind_of_target(client: OpenAI, model: ElasticModel) -> None:
    for target in ({"latency_ms": 8}, {"params": 200_000}, {"memory_gb": 0.0008}, {"max_loss_increase": 0.02}):
        answer = complete(client, extra_body={"flextron": target}, max_tokens=2)
        assert answer.flextron["spec"] == model.select(**target).to_dict()
        assert answer.flextron["target"] == target


def test_routed_tokens(client: OpenAI, model: ElasticModel) -> None:
    assert model.token_router is not None
    latency = next(iter(model.token_router.specs))
    wanted = model.generate("The city was", latency=latency, router="token", max_tokens=24)
    answer = complete(client, extra_body={"flextron": {"latency": latency, "router": "token"}})
    assert answer.choices[0].text == wanted
    assert answer.flextron["target"] == {"latency": latency, "router": "token"}
    named = complete(client, model=f"tiny@{latency}", extra_body={"flextron": {"router": "token"}})
    assert named.choices[0].text == wanted


class Recorder:
    """A token router that keeps what it chose."""

    def __init__(self, router: PricedRouter) -> None:
        self._router, self.chosen = router, list[Tensor]()

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        widths_N, gates_N = self._router(layer, x_ND)
        self.chosen.append(widths_N)
        return widths_N, gates_N

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        self._router.check(config, spec)


def test_shares_of_routed_tokens(client: OpenAI, model: ElasticModel) -> None:
    assert model.token_router is not None
    latency = next(iter(model.token_router.specs))
    extra = {"flextron": {"latency": latency, "router": "token"}, "return_token_ids": True}
    choice = complete(client, extra_body=extra, logprobs=0).choices[0]
    tokens = [*choice.prompt_token_ids, *choice.token_ids]
    recorder = Recorder(model.token_router.at(latency))
    spec = model.token_router.static_spec(latency)
    with torch.no_grad():
        model.decoder(Batch.padded(torch.tensor([tokens]), spec, recorder))
    share_T = torch.stack(recorder.chosen).sum(0) / sum(layer.intermediate_size for layer in model.space.full.layers)
    # what chose a token is what its predecessor ran through
    wanted = share_T[len(choice.prompt_token_ids) - 1 : -1].tolist()
    assert choice.flextron["mlp_shares"] == pytest.approx(wanted, abs=1e-4)
    assert len(set(choice.flextron["mlp_shares"])) > 1

    streamed: list[float] = []
    for chunk in complete(client, extra_body=extra, stream=True):
        streamed += getattr(chunk.choices[0], "flextron", {}).get("mlp_shares", [])
    assert streamed == choice.flextron["mlp_shares"]
    assert not hasattr(complete(client, extra_body={"return_token_ids": True}).choices[0], "flextron")


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("tiny@0.6", {"latency": 0.8}, "different targets"),
        ("tiny@0.6", {"params": 200_000}, "different targets"),
        ("tiny@0.1", None, "spans 0.5 to 1"),
        ("tiny", {"latency": 0.1}, "spans 0.5 to 1"),
        ("tiny@7", None, r"in \(0, 1\]"),
        ("tiny", {"latency": 0.6, "params": 200_000}, "exactly one of"),
        ("tiny", {"speed": 1}, "speed"),
        ("tiny", {"router": "token"}, "give latency"),
        ("tiny", {"latency": 0.123, "router": "token"}, "calibrated for the targets"),
        ("tiny", {"router": "best"}, "token"),
    ],
)
def test_targets_that_cannot_be_met(client: OpenAI, name: str, target: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        complete(client, model=name, extra_body=None if target is None else {"flextron": target})


def test_the_same_target_in_both_places(client: OpenAI) -> None:
    assert complete(client, model="tiny@0.60", extra_body={"flextron": {"latency": 0.6}}).flextron["params"] == 175680


def test_targets_share_iterations_and_keep_their_answers(server: Running, model: ElasticModel) -> None:
    targets = [1.0, 0.5, 0.8, 0.6] * 3
    prompts = [PROMPTS[i % 3] for i in range(len(targets))]

    async def one(client: openai.AsyncOpenAI, prompt: str, target: float) -> str:
        stream = await client.completions.create(
            model=f"tiny@{target}", prompt=prompt, max_tokens=30, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, p, t) for p, t in zip(prompts, targets, strict=True)))

    wanted = Engine(model, kv_cache_gb=0.005).generate(
        prompts, SamplingParams(max_tokens=30), target=[Target(latency=t) for t in targets]
    )
    assert asyncio.run(all_of_them()) == [c.text for c in wanted]
    server.wait_until_idle()


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_makes_up_the_whole(client: OpenAI, seed: int) -> None:
    options: dict[str, Any] = {"seed": seed, "temperature": 1.5, "top_p": 0.95, "n": 2}
    options |= {"logprobs": 2, "stop": ["th", " o"]}
    whole = complete(client, **options)
    texts, tokens, reasons = ["", ""], [[], []], [None, None]
    stream = complete(client, stream=True, stream_options={"include_usage": True}, **options)
    *chunks, last = list(stream)
    for chunk in chunks:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        reasons[choice.index] = choice.finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert texts == [c.text for c in whole.choices]
    assert tokens == [c.logprobs.tokens for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert chunks[0].flextron == whole.flextron
    assert {chunk.id for chunk in chunks} == {last.id}


def test_seeds_make_answers_repeatable_and_choices_different(client: OpenAI) -> None:
    first, second = (complete(client, seed=5, temperature=1, n=3) for _ in range(2))
    texts = [c.text for c in first.choices]
    assert texts == [c.text for c in second.choices]
    assert len(set(texts)) == 3
    assert complete(client, seed=2**63 - 1, temperature=1, n=2).choices[1].text


def test_prompts_of_all_forms(client: OpenAI, server: Running) -> None:
    ids = [server.service.tokenizer.encode(p) for p in PROMPTS]
    texts = [c.text for c in complete(client, PROMPTS).choices]
    assert texts == [complete(client, p).choices[0].text for p in PROMPTS]
    assert texts == [c.text for c in complete(client, ids).choices]
    assert texts[0] == complete(client, ids[0]).choices[0].text
    usage = complete(client, PROMPTS, n=2, temperature=1, extra_body={"ignore_eos": True}).usage
    assert usage.prompt_tokens == sum(map(len, ids))
    assert usage.completion_tokens == 2 * 24 * len(PROMPTS)


def test_echo(client: OpenAI) -> None:
    plain, echoed = complete(client, PROMPTS), complete(client, PROMPTS, echo=True)
    wanted = [p + c.text for p, c in zip(PROMPTS, plain.choices, strict=True)]
    assert [c.text for c in echoed.choices] == wanted
    texts = [""] * len(PROMPTS)
    for chunk in complete(client, PROMPTS, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == wanted


def test_stop_strings_and_defaults(client: OpenAI) -> None:
    text = complete(client).choices[0].text
    word = text.split()[3]
    (stopped,) = complete(client, stop=word).choices
    assert stopped.text == text[: text.index(word)]
    assert stopped.finish_reason == "stop"
    assert complete(client, max_tokens=None).usage.completion_tokens == 16
    assert complete(client, max_tokens=None, temperature=None, top_p=None, n=None, stop=None).choices
    assert complete(client, temperature=1e-30).choices[0].text == text
    assert complete(client, temperature=1, top_p=0).choices[0].text == text


def test_logprobs_are_those_of_the_engine(client: OpenAI, model: ElasticModel) -> None:
    engine = Engine(model, kv_cache_gb=0.005)
    (wanted,) = engine.generate("The city was", SamplingParams(max_tokens=8, logprobs=3))
    assert wanted.logprobs is not None
    found = complete(client, max_tokens=8, logprobs=3).choices[0].logprobs
    assert found.token_logprobs == pytest.approx([p.chosen for p in wanted.logprobs], abs=1e-4)
    assert "".join(found.tokens) == wanted.text
    assert [len(top) for top in found.top_logprobs] == [3] * 8
    assert all(sum(map(math.exp, top.values())) <= 1 for top in found.top_logprobs)
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(8)]


def test_bytes_of_incomplete_characters_have_names(server: Running) -> None:
    names, tokenizer = server.service.names, server.service.tokenizer
    tokens = tokenizer.encode("🙂 and é")
    assert b"".join(map(names.raw, tokens)).decode() == "🙂 and é"
    keys = [names.key(t) for t in range(len(tokenizer))]
    assert len(set(keys)) == len(keys)
    assert names.key(tokens[0]) == "bytes:\\xf0"


def test_ids_of_requests(server: Running) -> None:
    with httpx.Client(base_url=server.url) as client:
        ids = [client.get("/health", headers=h).headers["x-request-id"] for h in ({}, {}, {"x-request-id": "a\tb"})]
        assert client.get("/health", headers={"x-request-id": "run-7"}).headers["x-request-id"] == "run-7"
    assert len(set(ids)) == 3
    assert all(len(i) == 32 for i in ids)

"""`/v1/embeddings` through OpenAI's client, against hidden states of `transformers` and peft."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from flextron import ElasticModel
from flextron.checkpoints.peft.writing import write_adapter
from flextron.serving.adapters import AdapterNames, adapter_reader
from tests.model.adapter_cases import random_lora
from tests.server.running import Running, running
from tests.server.test_refusals import assert_refused
from tests.trained import trained_model

# peft asks transformers under a name that the latter has retired
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TEXTS = ["In 1998 the city was not there, it said.", "The city", "a"]


@pytest.fixture(scope="module")
def stock(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Any]:
    """What `transformers` loads of the full model and of the sub-network for 0.6."""
    path = tmp_path_factory.mktemp("stock")
    for latency in (1.0, 0.6):
        model.export(
            path / str(latency), spec=model.select(latency=latency), format="hf", precision="float32", pad=True
        )
    return {latency: AutoModelForCausalLM.from_pretrained(path / str(latency)).eval() for latency in (1.0, 0.6)}


@torch.no_grad()
def states(reference: Any, ids: list[int]) -> Tensor:
    """Final hidden states, (T, hidden size)."""
    found: Tensor = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return found


def pooled(reference: Any, ids: list[int], pooling: str) -> Tensor:
    found = states(reference, ids)
    return found.mean(0) if pooling == "mean" else found[-1]


def embed(server: Running, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": "a"} | body, timeout=60)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("latency", [1.0, 0.6])
@pytest.mark.parametrize("as_ids", [False, True])
def test_openais_client(server: Running, stock: dict[float, Any], latency: float, pooling: str, as_ids: bool) -> None:
    ids = [server.service.tokenizer.encode(text) for text in TEXTS]
    asked: Any = ids if as_ids else TEXTS
    # the client asks for base64 unless it is told otherwise
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        made = server.client().embeddings.create(
            model=f"tiny@{latency:g}", input=asked, extra_body={"pooling": pooling}, **options
        )
        assert [entry.index for entry in made.data] == [0, 1, 2]
        assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, ids))
        assert (made.object, made.model, made.data[0].object) == ("list", f"tiny@{latency:g}", "embedding")
        report: Any = made.model_extra["flextron"]  # type: ignore[index]
        assert (report["pooling"], report["normalized"], report["asked"]) == (pooling, True, {"latency": latency})
        for own, entry in zip(ids, made.data, strict=True):
            given: Any = entry.embedding
            values = np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given)
            wanted = pooled(stock[latency], own, pooling)
            np.testing.assert_allclose(values, wanted / wanted.norm(), rtol=0, atol=1e-5)
    server.wait_until_idle()


@pytest.mark.parametrize("asked", ["The city", ["The city"], [5, 6, 7], [[5, 6, 7]]])
def test_one_input(server: Running, stock: dict[float, Any], asked: Any) -> None:
    """The mean is the default; without `normalize` vectors are the hidden states themselves."""
    ids = [5, 6, 7] if not isinstance(asked[0], str) else server.service.tokenizer.encode("The city")
    made = embed(server, input=asked, normalize=False).json()
    assert made["flextron"]["pooling"] == "mean"
    assert made["flextron"]["normalized"] is False
    assert len(made["data"]) == 1
    np.testing.assert_allclose(made["data"][0]["embedding"], pooled(stock[1.0], ids, "mean"), rtol=1e-4, atol=1e-4)


def test_more_inputs_than_run_or_wait(model: ElasticModel) -> None:
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, 64, rng.integers(1, 12)).tolist() for _ in range(41)]
    with running(model, max_queue=0) as server:
        made = embed(server, input=asked).json()["data"]
        for i in (0, 7, 8, 40):
            alone = embed(server, input=asked[i]).json()["data"][0]["embedding"]
            np.testing.assert_allclose(made[i]["embedding"], alone, atol=1e-5)
        server.wait_until_idle()
        metrics = httpx.get(f"{server.url}/metrics").text
    assert f'vllm:request_success_total{{finished_reason="stop",model_name="tiny"}} {45.0}' in metrics


def test_beside_completions(server: Running, stock: dict[float, Any]) -> None:
    options: Any = {"model": "tiny@0.6", "prompt": TEXTS[0], "max_tokens": 40, "temperature": 0}
    alone = server.client().completions.create(**options).choices[0].text
    told: list[str] = []
    others = [
        threading.Thread(target=lambda: told.append(server.client().completions.create(**options).choices[0].text))
        for _ in range(4)
    ]
    for other in others:
        other.start()
    ids = server.service.tokenizer.encode(TEXTS[0])
    wanted = pooled(stock[1.0], ids, "mean")
    for _ in range(10):
        found = embed(server, input=TEXTS[0]).json()["data"][0]["embedding"]
        np.testing.assert_allclose(found, wanted / wanted.norm(), atol=1e-5)
    for other in others:
        other.join()
    assert told == [alone] * 4


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path, Path]]:
    """A server with an adapter, the adapter's directory, and its base model's."""
    path = tmp_path_factory.mktemp("adapted")
    model = trained_model()
    model.export(path / "base", spec=model.space.full, format="hf", precision="float32")
    write_adapter(random_lora(model.decoder.config), path / "adapter")
    names = AdapterNames()
    names.add("legal", path / "adapter", adapter_reader(model.decoder))
    with running(model, adapters=names) as made:
        yield made, path / "adapter", path / "base"


def test_adapters_against_peft(adapted: tuple[Running, Path, Path]) -> None:
    server, adapter, base = adapted
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for text in TEXTS:
        made = embed(server, model="legal", input=text, normalize=False).json()
        assert made["flextron"]["adapter"] == "legal"
        wanted = pooled(reference, server.service.tokenizer.encode(text), "mean")
        np.testing.assert_allclose(made["data"][0]["embedding"], wanted, rtol=1e-3, atol=1e-3)
    assert embed(server, model="legal@0.6").json()["flextron"]["target"] == {"latency": 0.6}


def test_vectors_are_never_narrowed(model: ElasticModel) -> None:
    with running(model, slo_tpot_ms=1e-6, min_latency_target=0.5) as server:
        assert server.service.adaptive is not None
        for _ in range(40):
            server.service.adaptive._cap.update(9.0)
        assert server.service.cap == 0.5
        made = embed(server).json()["flextron"]
        assert made["target"] is None
        assert made["spec"] == model.space.full.to_dict()
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
        assert answer.json()["flextron"]["target"] == {"latency": 0.5}
        assert_refused(embed(server, flextron={"min_latency_target": 0.6}), 400, "do not compare")


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": [[1], []]}, "input", "empty"),
        ({"input": [1, "a"]}, "input", ""),
        ({"input": None}, "input", ""),
        ({"input": [10**6]}, "input", "vocabulary"),
        ({"input": [-1]}, "input", "vocabulary"),
        ({"input": ["a", "a" * 3000]}, "input", "positions"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"dimensions": 8}, "dimensions", "leave dimensions out"),
        ({"dimensions": 0}, "dimensions", ""),
        ({"encoding_format": "hex"}, "encoding_format", ""),
        ({"pooling": "cls"}, "pooling", "'mean' or 'last'"),
        ({"flextron": {"latency": 0.01}}, "flextron", ""),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "not supported"),
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens", "not supported"),
        ({"inputs": "a"}, "inputs", "no key"),
    ],
)
def test_refusals(server: Running, changes: dict[str, Any], param: str, said: str) -> None:
    assert assert_refused(embed(server, **changes), 400, said)["param"] == param


def test_more_refusals(server: Running, model: ElasticModel) -> None:
    size = model.decoder.config.hidden_size
    assert len(embed(server, dimensions=size).json()["data"][0]["embedding"]) == size
    assert_refused(embed(server, model="other"), 404)
    assert assert_refused(httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny"}), 400)["param"] == "input"

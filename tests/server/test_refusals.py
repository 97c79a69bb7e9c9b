"""What the server does not take: it says so in OpenAI's shape, with a status after which clients do the right thing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flextron import ElasticModel, FlextronError
from flextron.engine import EngineSettings
from flextron.server.app import create_app
from flextron.serving.settings import ServerSettings
from tests.server.conftest import TEMPLATE
from tests.server.malformed import bodies
from tests.server.running import KEY, Running, running, wait_until
from tests.trained import trained_model

GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 2}
JSON = {"content-type": "application/json"}
PATHS = ["/v1/completions", "/v1/chat/completions"]


def assert_refused(answer: httpx.Response, status: int, said: str = "") -> dict[str, Any]:
    """OpenAI's shape, and Anthropic's where its paths are."""
    assert answer.status_code == status
    error: dict[str, Any] = answer.json()["error"]
    frame = {"type": "error"} if answer.request.url.path.startswith("/v1/messages") else {}
    assert answer.json() == {"error": error, **frame}
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    return error


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as client:
        yield client


def check_strange(client: httpx.Client, url: str, body: bytes) -> None:
    """Any answer but a failure."""
    answer = client.post(url, content=body, headers=JSON)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert_refused(answer, answer.status_code)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
def test_no_body_is_too_strange(
    server: Running, chat_server: Running, http: httpx.Client, path: str, body: bytes
) -> None:
    check_strange(http, (chat_server if "chat" in path else server).url + path, body)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PATHS)
def test_memory_returns_to_its_level_after_5000_strange_bodies(http: httpx.Client, path: str) -> None:
    chat_model = trained_model()
    assert chat_model.tokenizer is not None
    chat_model.tokenizer.chat_template = TEMPLATE
    with running(chat_model) as made:
        # drawn beforehand: hypothesis remembers what it drew, some 70 MB
        drawn: list[bytes] = []

        @settings(max_examples=5000, deadline=None, database=None)
        @given(body=bodies)
        def draw(body: bytes) -> None:
            drawn.append(body)

        draw()
        for body in drawn[:500]:
            check_strange(http, made.url + path, body)
        before = psutil.Process().memory_info().rss
        for body in drawn[500:]:
            check_strange(http, made.url + path, body)
        made.wait_until_idle()
        made.service.core.pool.check_integrity([])
        assert made.service.is_idle
        assert psutil.Process().memory_info().rss - before < 32e6
        assert made.client().completions.create(**GOOD).choices  # type: ignore[call-overload]


def test_the_server_is_well_after_all_that(server: Running, chat_server: Running) -> None:
    for made in (server, chat_server):
        made.wait_until_idle()
        assert made.client().completions.create(**GOOD).choices  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [[1], [512]]}, "prompt"),
        ({"prompt": [-1], "echo": True}, "prompt"),
        ({"prompt": [10**30], "echo": True}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"logit_bias": {"a": 3}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 3}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 3}}, "logit_bias"),
        ({"logit_bias": {"512": 3}}, "logit_bias"),
        ({"allowed_token_ids": [3, 512]}, "allowed_token_ids"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"suffix": "b"}, None),
        ({"max_tokens": 1000}, "prompt"),
        ({"prompt": "a" * 10**6}, "prompt"),
        ({"prompt": "a b " * 300}, "prompt"),
    ],
)
def test_bad_values_are_named(server: Running, changes: dict[str, Any], param: str | None) -> None:
    error = assert_refused(httpx.post(f"{server.url}/v1/completions", json=GOOD | changes), 400)
    assert error["type"] == "invalid_request_error"
    assert param is None or str(error["param"]).startswith(param)


def test_keys_that_change_nothing_are_ignored(server: Running) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "best_of": 1}
    others = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "a"}
    assert httpx.post(f"{server.url}/v1/completions", json=GOOD | neutral | others).status_code == 200


def test_paths_and_methods(server: Running) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert_refused(client.get("/v1/completions"), 405, "GET")
        assert_refused(client.delete("/v1/models"), 405)
        assert_refused(client.get("/v1/nothing"), 404, "/v1/nothing")
        error = assert_refused(client.post("/v1/completions", json=GOOD | {"model": "gpt"}), 404, "'gpt'")
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_large_bodies(model: ElasticModel) -> None:
    with running(model, max_body_mb=0.01) as made, httpx.Client(base_url=made.url) as client:
        for size in (20_000, 300_000):
            answer = client.post("/v1/completions", json=GOOD | {"user": "a" * size})
            assert_refused(answer, 413, "10000 bytes")
            answer = client.post("/v1/completions", content=(b"a" * 1000 for _ in range(size // 1000)), headers=JSON)
            assert_refused(answer, 413)
        assert client.post("/v1/completions", json=GOOD | {"user": "a" * 5_000}).status_code == 200


def test_keys(model: ElasticModel) -> None:
    with running(model, api_key=KEY) as made, httpx.Client(base_url=made.url) as client:
        for value in (None, "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer", "Bearer é".encode()):
            headers: Any = {} if value is None else {"authorization": value}
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/nothing")):
                error = assert_refused(client.request(method, path, headers=headers), 401, "Authorization")
                assert error["code"] == "invalid_api_key"
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            made.client(api_key="wrong").models.list()
        assert made.client().completions.create(**GOOD).choices  # type: ignore[call-overload]


def test_a_full_queue(model: ElasticModel) -> None:
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 32}
    with running(model, engine, max_queue=1) as made:
        made.slow_down(0.02)
        client = made.client()
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True)
        next(stream)
        answers: list[str] = []
        options: Any = GOOD | {"prompt": "In 1998", "temperature": 0}
        waiting = threading.Thread(target=lambda: answers.append(client.completions.create(**options).choices[0].text))
        waiting.start()
        wait_until(lambda: made.service.worker.load.num_waiting == 1)
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            client.completions.create(**options)
        assert refused.value.response.headers["retry-after"] == "1"
        # what can never be queued is no matter of patience
        with pytest.raises(openai.BadRequestError, match="3 answers at once"):
            client.completions.create(**options | {"n": 3, "temperature": 1})
        stream.close()
        waiting.join(20)
        assert answers == [client.completions.create(**options).choices[0].text]
        # a client that is patient gets through
        patient = made.client(max_retries=5)
        assert patient.completions.create(**options).choices


def test_the_operators_limit(model: ElasticModel) -> None:
    with running(model, max_tokens_limit=5) as made:
        client: Any = made.client()
        with pytest.raises(openai.BadRequestError, match="at most 5"):
            client.completions.create(**GOOD | {"max_tokens": 6})
        assert client.completions.create(**GOOD | {"max_tokens": None}).usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "a b"}, "word without @"),
        ({"name": "a@0.5"}, "word without @"),
        ({"name": ""}, "word without @"),
        ({"api_key": ""}, "API key"),
        ({"api_key": "ключ"}, "API key"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_body_mb": float("nan")}, "max_body_mb"),
        ({"max_tokens_limit": 0}, "max_tokens_limit"),
        ({"drain_seconds": float("inf")}, "drain_seconds"),
    ],
)
def test_bad_settings(model: ElasticModel, values: dict[str, Any], said: str) -> None:
    with pytest.raises(FlextronError, match=said):
        create_app(model, ServerSettings(**values), EngineSettings(kv_cache_gb=0.001))


@given(st.text(max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_of_a_model(server: Running, http: httpx.Client, name: str) -> None:
    answer = http.get(f"{server.url}/v1/models/" + "".join(f"%{b:02X}" for b in name.encode()))
    assert answer.status_code in (200, 404)

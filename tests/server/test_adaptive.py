"""The policy alone, on a queue that is simulated, and then in the server."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron import ElasticModel, FlextronError
from flextron.engine import EngineSettings
from flextron.server.app import create_app
from flextron.serving.adaptive import Adaptive, Cap, Objective
from flextron.serving.settings import ServerSettings
from tests.server.running import SHORT_TEMPLATE, Running, events, running, running_chat, wait_until
from tests.server.test_metrics import samples

RUNGS = (1.0, 0.85, 0.6, 0.5)
LADDERS = st.sets(st.integers(5, 99), max_size=7).map(lambda found: (1.0, *(f / 100 for f in sorted(found)[::-1])))
LOADS = st.lists(st.tuples(st.floats(0, 3), st.floats(0, 2)), max_size=60)


def test_the_load_is_the_worse_of_two_times() -> None:
    both = Objective(tpot_ms=50, ttft_ms=1000)
    assert both.load(0.1, 0.5) == pytest.approx(2)
    assert both.load(0.01, 3) == pytest.approx(3)
    assert Objective(tpot_ms=50).load(0.1, 99) == pytest.approx(2)
    assert Objective(ttft_ms=50).load(99, 0.1) == pytest.approx(2)
    assert Objective().load(99, 99) == 0


@given(rungs=LADDERS, loads=LOADS)
def test_more_load_never_widens(rungs: tuple[float, ...], loads: list[tuple[float, float]]) -> None:
    light, heavy = Cap(rungs), Cap(rungs)
    assert light.value == 1
    for load, more in loads:
        light.update(load)
        heavy.update(load + more)
        assert heavy.value <= light.value
        assert light.value in rungs


@given(rungs=LADDERS, base=st.floats(0, 4), lag=st.integers(1, 5))
def test_a_steady_load_settles(rungs: tuple[float, ...], base: float, lag: int) -> None:
    """Running requests keep their widths, so the load follows the cap late."""
    cap, past = Cap(rungs), deque([1.0] * lag, maxlen=lag)
    values = []
    for _ in range(300):
        cap.update(base * sum(past) / lag)
        past.append(cap.value)
        values.append(cap.value)
    assert len(set(values[-100:])) == 1
    at = rungs.index(cap.value)
    assert base * cap.value <= 1 + 1e-9 or at == len(rungs) - 1
    assert at == 0 or base * rungs[at - 1] > 0.9 - 1e-9


class Queue:
    """One server after the other: a request takes a second at full width, less in proportion to its target."""

    def __init__(self, *, is_adaptive: bool) -> None:
        self.policy = Adaptive(Objective(ttft_ms=4000), RUNGS if is_adaptive else (1.0,))
        self.waiting: deque[tuple[float, float]] = deque()
        self.now = self.free_at = 0.0
        self.waits: list[float] = []

    def interval(self, num_arrivals: float) -> None:
        """Half a second in which so many requests arrive."""
        for i in range(int(num_arrivals)):
            self.waiting.append((self.now + 0.5 * i / num_arrivals, self.policy.cap))
        self.now += 0.5
        while self.waiting and max(self.free_at, self.waiting[0][0]) < self.now:
            arrived, width = self.waiting.popleft()
            start = max(self.free_at, arrived)
            self.free_at = start + width
            self.waits.append(start - arrived)
            self.policy.token(start - arrived, is_first=True)
        oldest = self.now - self.waiting[0][0] if self.waiting else 0.0
        self.policy.end_interval(0.5, num_running=1, num_waiting=len(self.waiting), oldest=oldest)


def test_a_burst_narrows_and_a_pause_widens() -> None:
    queues = [Queue(is_adaptive=False), Queue(is_adaptive=True)]
    caps = []
    for queue in queues:
        for i in range(200):
            # one request a second is all that full width can do; in the burst there are two
            queue.interval(1 if 40 <= i < 100 or i % 4 == 0 else 0)
            if queue is queues[1]:
                caps.append(queue.policy.cap)
    assert set(caps[:40]) == {1.0}
    assert min(caps[40:100]) == 0.5
    assert caps[-1] == 1
    assert max(queues[1].waits) < 0.4 * max(queues[0].waits)


def test_training_narrows_nobody_and_holds_nobody_back() -> None:
    """It takes what the objectives leave, so that times are near them or a little beyond."""
    policy = Adaptive(Objective(tpot_ms=50), (1.0, 0.75, 0.5))

    def intervals(count: int, tpot: float, training: float) -> None:
        for _ in range(count):
            policy.token(tpot, is_first=False)
            policy.end_interval(0.5, num_running=1, num_waiting=0, oldest=0, training=training)

    intervals(20, 0.052, training=0.3)
    assert policy.cap == 1
    intervals(20, 0.052, training=0.0)
    assert policy.cap == 0.5
    intervals(20, 0.049, training=0.3)
    assert policy.cap == 1


def test_the_queue_tells_before_the_wait_is_long() -> None:
    """Ten in the queue, of which one an interval gets its turn, will take five seconds; nobody waited two yet."""
    policy = Adaptive(Objective(ttft_ms=4000), RUNGS)
    for i in range(3):
        policy.token(0.5 * i, is_first=True)
        policy.end_interval(0.5, num_running=1, num_waiting=10, oldest=0.5 * i)
    assert policy.cap < 1


def test_iterations_longer_than_an_interval_are_not_taken_for_calm() -> None:
    policy = Adaptive(Objective(tpot_ms=500), RUNGS)
    for i in range(60):
        if i % 3 == 0:
            policy.token(1.5, is_first=False)
        policy.end_interval(0.5, num_running=1, num_waiting=0, oldest=0)
    assert policy.cap == 0.5
    for _ in range(60):
        policy.end_interval(0.5, num_running=0, num_waiting=0, oldest=0)
    assert policy.cap == 1


@pytest.fixture
def fast_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flextron.serving.service.INTERVAL_SECONDS", 0.05)


def ask(server: Running, name: str = "tiny", **target: Any) -> dict[str, Any]:
    body = {"model": name, "prompt": "The city was", "max_tokens": 2, "temperature": 0} | (
        {"flextron": target} if target else {}
    )
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.usefixtures("fast_intervals")
def test_a_burst_gets_narrower_sub_networks(model: ElasticModel) -> None:
    with running(model, slo_tpot_ms=15, min_latency_target=0.6) as made:
        wide = {"flextron": {"min_latency_target": 1}}
        options: dict[str, Any] = {"max_tokens": 127, "temperature": 0, "stream": True, "extra_body": wide}
        stream = made.client().completions.create(model="tiny", prompt="a", **options)
        assert next(stream).flextron["target"] is None
        made.slow_down(0.03)
        # the policy lowers by one rung after the other, and requests that the flag speaks for stop at 0.6
        wait_until(lambda: made.service.cap == 0.5)
        narrow = ask(made)
        assert narrow["flextron"]["asked"] is None
        assert narrow["flextron"]["target"] == {"latency": 0.6}
        assert narrow["flextron"]["spec"] == model.select(latency=0.6).to_dict()
        assert narrow["choices"][0]["text"] == model.generate("The city was", latency=0.6, max_tokens=2)
        assert narrow["model"] == "tiny"
        assert ask(made, "tiny@0.8")["flextron"]["asked"] == {"latency": 0.8}
        assert ask(made, "tiny@0.8")["flextron"]["target"] == {"latency": 0.6}
        assert ask(made, "tiny@0.5")["flextron"]["target"] == {"latency": 0.5}
        # requests have the last word
        assert ask(made, min_latency_target=0.4)["flextron"]["target"] == {"latency": 0.5}
        assert ask(made, latency=1, min_latency_target=0.8)["flextron"]["target"] == {"latency": 0.8}
        kept = ask(made, min_latency_target=1)["flextron"]
        assert kept["target"] is None
        assert kept["spec"] == model.space.full.to_dict()
        assert ask(made, "tiny@0.8", min_latency_target=0.9)["flextron"]["target"] == {"latency": 0.8}
        # there is no narrower target of these kinds
        assert ask(made, params=200_000)["flextron"]["target"] == {"params": 200_000}
        assert model.token_router is not None
        routed = {"latency": max(model.token_router.specs), "router": "token"}
        assert ask(made, **routed)["flextron"]["target"] == routed
        assert samples(made)["flextron:latency_cap", ""] == 0.5
        assert samples(made)["flextron:narrowed_requests_total", ""] == 5
        stream.close()
        made.wait_until_idle()
        wait_until(lambda: made.service.cap == 1)
        assert ask(made, min_latency_target=0.5)["flextron"]["target"] is None


@pytest.mark.usefixtures("fast_intervals")
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_running_answer_goes_on_in_a_narrower_sub_network(model: ElasticModel, is_stream: bool) -> None:
    body = {"model": "tiny", "prompt": "The city was", "max_tokens": 100, "temperature": 0, "stream": is_stream}
    allowed = body | {"flextron": {"min_latency_target": 0.6}, "return_token_ids": True}
    with running(model, slo_tpot_ms=15) as made:
        made.slow_down(0.03)
        answer = httpx.post(f"{made.url}/v1/completions", json=allowed, timeout=60)
        told = [json.loads(e) for e in events(answer.text)[:-1]] if is_stream else [answer.json()]
        assert samples(made)["flextron:narrowed_requests_total", ""] == 1
        assert samples(made)["flextron:tokens_total", "latency=0.60"] > 30
    reports = [piece["flextron"] for piece in told if "flextron" in piece]
    assert reports[-1]["asked"] is None
    assert reports[-1]["target"] == {"latency": 0.6}
    assert reports[-1]["first_target"] is None
    assert reports[-1]["spec"] == model.select(latency=0.6).to_dict()
    tokens = [t for piece in told for choice in piece["choices"] for t in choice["token_ids"]]
    assert len(tokens) == 100
    text = "".join(choice["text"] for piece in told for choice in piece["choices"])
    assert text.startswith(model.generate("The city was", max_tokens=1))
    if is_stream:
        # the first chunk tells what it began in, one in the middle what it goes on in, and the others nothing
        assert (reports[0]["target"], "first_target" in reports[0]) == (None, False)
        assert [r["target"]["latency"] for r in reports[1:]] == sorted(
            (r["target"]["latency"] for r in reports[1:]), reverse=True
        )
        assert len(reports) < 10


@pytest.mark.usefixtures("fast_intervals")
@pytest.mark.parametrize(("path", "last"), [("responses", "response.completed"), ("messages", "message_delta")])
def test_other_protocols_tell_it_at_the_end(path: str, last: str) -> None:
    with running_chat(SHORT_TEMPLATE, slo_tpot_ms=15, min_latency_target=0.6) as made:
        made.slow_down(0.03)
        body: dict[str, Any] = {"model": "tiny", "stream": True, "temperature": 0}
        if path == "responses":
            body |= {"input": "a", "max_output_tokens": 60}
        else:
            body |= {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60}
        answer = httpx.post(f"{made.url}/v1/{path}", json=body, timeout=60)
    told = [json.loads(e) for e in events(answer.text)]
    final = next(e for e in told if e["type"] in (last, "response.incomplete"))
    assert (final.get("response") or final)["flextron"]["target"] == {"latency": 0.6}


@pytest.mark.usefixtures("fast_intervals")
def test_a_queue_narrows_too_and_streams_say_so(model: ElasticModel) -> None:
    with running(model, {"max_num_seqs": 1, "max_num_batched_tokens": 32}, slo_ttft_ms=100) as made:
        made.slow_down(0.01)
        client = made.client()
        streams = [client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True) for _ in range(5)]
        wait_until(lambda: made.service.cap == 0.5)
        # nobody allowed it
        assert all(next(stream).flextron["target"] is None for stream in streams[:1])
        body = {
            "model": "tiny",
            "prompt": "a",
            "max_tokens": 1,
            "stream": True,
            "flextron": {"min_latency_target": 0.5},
        }
        for stream in streams:
            stream.close()
        told = events(httpx.post(f"{made.url}/v1/completions", json=body, timeout=30).text)
        assert json.loads(told[0])["flextron"]["target"] == {"latency": 0.5}


def test_without_objectives_nothing_is_narrowed(server: Running) -> None:
    assert server.service.adaptive is None
    assert ask(server, min_latency_target=0.5)["flextron"]["target"] is None
    assert samples(server)["flextron:latency_cap", ""] == 1
    for bad in ({"params": 200_000}, {"latency": 0.8, "router": "token"}):
        with pytest.raises(openai.BadRequestError, match="min_latency_target goes with a latency target"):
            server.client().completions.create(
                model="tiny", prompt="a", extra_body={"flextron": bad | {"min_latency_target": 0.5}}
            )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"slo_tpot_ms": 0.0}, "slo_tpot_ms"),
        ({"slo_ttft_ms": float("nan")}, "slo_ttft_ms"),
        ({"min_latency_target": 0.5}, "needs an objective"),
        ({"min_latency_target": 1.5, "slo_tpot_ms": 5.0}, "min_latency_target must be"),
        ({"client_seconds": 0.0}, "client_seconds"),
    ],
)
def test_bad_settings(model: ElasticModel, values: dict[str, Any], said: str) -> None:
    with pytest.raises(FlextronError, match=said):
        create_app(model, ServerSettings(**values), EngineSettings(kv_cache_gb=0.001))

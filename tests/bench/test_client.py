"""The client against a server that emits tokens at known times; upper bounds are wide, for loaded machines."""

from __future__ import annotations

import asyncio
import json
import socket
from itertools import pairwise
from typing import Any

import pytest

from flextron.bench.client import Server
from flextron.bench.plan import Arrivals, Load, Request, make_plan
from flextron.bench.prompts import PromptMaker
from flextron.bench.report import Report
from flextron.bench.runner import drive
from flextron.bench.serve import bench_serve
from flextron.bench.timeline import Timeline
from flextron.errors import FlextronError
from tests.bench.serving import HEAD, Behaviour, Exchange, answering, serving

SLACK_S = 0.6


def load(**options: Any) -> Load:
    return Load(**{"num_requests": 4, "prompt_tokens": "6", "output_tokens": "5", **options})


def measure(behaviour: Behaviour, this: Load | None = None, **options: Any) -> tuple[Report, list[dict[str, Any]]]:
    """The report, and the bodies that the server got."""
    server = {name: options.pop(name) for name in ("endpoint", "timeout_s", "ignore_eos") if name in options}
    with serving(behaviour) as served:
        report = bench_serve(
            Server(url=served.url, model="m", **server), this or load(), **{"warmup": 0, "concurrency": 4, **options}
        )
        return report, served.bodies


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_times_are_those_at_which_the_server_sent_text(endpoint: str) -> None:
    report, bodies = measure(answering(first_s=0.2, gap_s=0.05), endpoint=endpoint)
    assert report.summary.num_ok == 4
    for line in report.run.timelines:
        assert line.ttft_s is not None
        assert line.tpot_s is not None
        # an early event before any text (the role, in a chat) does not stop the clock
        assert 0.2 <= line.ttft_s < 0.2 + SLACK_S
        assert 0.04 <= line.tpot_s < 0.05 + SLACK_S / 4
        assert len(line.itl_s) == 4
        assert 0.39 <= line.e2e_s < 0.4 + SLACK_S
        assert (line.output_tokens, line.usage_tokens, line.prompt_tokens) == (5, 5, 7)
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in bodies)
    assert all(body["model"] == "m" and body["max_tokens"] == 5 for body in bodies)
    assert all(("prompt" in body) == (endpoint == "completions") for body in bodies)


def test_usage_counts_where_chunks_hold_several_tokens() -> None:
    report, _ = measure(answering(tokens=2, gap_s=0.02), load(output_tokens="8"))
    assert (report.summary.output_tokens, report.summary.num_chunks) == (32, 16)
    assert report.summary.tokens_counted_by == "usage"
    assert all(line.tpot_s == pytest.approx(sum(line.itl_s) / 7) for line in report.run.timelines)


def test_chunks_count_where_the_server_sends_no_usage() -> None:
    report, _ = measure(answering(usage=False, num_tokens=3))
    assert report.summary.tokens_counted_by == "chunks"
    assert (report.summary.output_tokens, report.summary.wanted_tokens) == (12, 20)
    assert report.summary.prompt_tokens == 24
    told = " ".join(report.warnings())
    assert "no usage" in told
    assert "shorter than asked for" in told


def test_targets_are_suffixes_of_the_model_and_told_apart() -> None:
    report, bodies = measure(answering(), load(num_requests=20, targets=("1.0", "0.6")), ignore_eos=True)
    names = [body["model"] for body in bodies]
    assert set(names) == {"m@1.0", "m@0.6"}
    assert {t: s.num_requests for t, s in report.by_target.items()} == {
        t: names.count(f"m@{t}") for t in ("1.0", "0.6")
    }
    assert [row["target"] for row in report.targets()] == ["1.0", "0.6"]
    assert all(body["ignore_eos"] for body in bodies)


def test_waiting_counts_from_the_scheduled_arrival_and_is_told() -> None:
    """One slot, answers of 0.15 s, all due at once: the last waits for the three before it."""
    this = load(arrivals=Arrivals(rate=10_000))
    report, _ = measure(answering(first_s=0.15), this, concurrency=1)
    waits = sorted(line.ttft_s or 0 for line in report.run.timelines)
    assert waits[-1] >= 4 * 0.15 - 0.01
    assert max(line.late_s for line in report.run.timelines) >= 3 * 0.15 - 0.01
    assert "late" in report.warnings()[0]
    assert report.late_ms is not None
    assert report.latencies()[-1]["max"] == report.late_ms.max


def test_arrivals_do_not_wait_for_answers() -> None:
    this = load(num_requests=10, arrivals=Arrivals(rate=100.0), seed=2)
    report, _ = measure(answering(first_s=0.5), this, concurrency=None)
    assert report.summary.num_ok == 10
    # one after another would take 5 s
    assert report.duration_s < 3
    assert all(line.late_s >= 0 for line in report.run.timelines)
    assert all((line.ttft_s or 0) >= 0.5 for line in report.run.timelines)


def test_a_closed_loop_sends_when_a_slot_is_free() -> None:
    report, _ = measure(answering(first_s=0.1), concurrency=None)
    starts = sorted(line.sent_s for line in report.run.timelines)
    assert all(later - earlier >= 0.1 for earlier, later in pairwise(starts))
    assert all(line.late_s < 0.05 for line in report.run.timelines)
    assert (report.concurrency, report.plan.process) == (1, "closed loop")


def test_warm_up_requests_have_prompts_of_their_own_and_count_for_nothing() -> None:
    report, bodies = measure(answering(), warmup=2)
    assert len(bodies) == 6
    assert report.summary.num_requests == 4
    assert len({body["prompt"] for body in bodies}) == 6


async def refusing(exchange: Exchange) -> None:
    await exchange.refuse("500 Internal Server Error", b'{"error": {"message": "out of pages", "type": "server"}}')


async def plain_refusing(exchange: Exchange) -> None:
    await exchange.refuse("429 Too Many Requests", b"later")


async def silent(exchange: Exchange) -> None:
    exchange.writer.transport.abort()


async def breaking(exchange: Exchange) -> None:
    await exchange.write(HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked"))
    piece = b"data: " + json.dumps(exchange.chunk("some")).encode() + b"\n\n"
    await exchange.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    await asyncio.sleep(0.05)
    exchange.writer.transport.abort()


async def ending_early(exchange: Exchange) -> None:
    await exchange.write(HEAD)
    await exchange.event(exchange.chunk("some"))


async def failing_midway(exchange: Exchange) -> None:
    await exchange.write(HEAD)
    await exchange.event(exchange.chunk("some"))
    await exchange.event({"error": {"message": "engine died"}})


async def malformed(exchange: Exchange) -> None:
    await exchange.write(HEAD)
    await exchange.event(b"{not json")


async def not_streaming(exchange: Exchange) -> None:
    await exchange.refuse("200 OK", b'{"choices": [{"text": "all at once"}]}')


async def wordless(exchange: Exchange) -> None:
    await exchange.write(HEAD)
    await exchange.event(exchange.chunk("", "stop"))
    await exchange.event(b"[DONE]")


async def endless(exchange: Exchange) -> None:
    await exchange.write(HEAD)
    await asyncio.sleep(60)


FAILURES = {
    refusing: ("http 500", "out of pages"),
    plain_refusing: ("http 429", "later"),
    silent: ("no answer", ""),
    breaking: ("broken stream", "Error"),
    ending_early: ("broken stream", "finish reason"),
    failing_midway: ("error in stream", "engine died"),
    malformed: ("malformed chunk", "{not json"),
    not_streaming: ("no stream", "application/json"),
    wordless: ("no text", ""),
    endless: ("timeout", "0.5 s"),
}


@pytest.mark.parametrize("behaviour", FAILURES, ids=lambda behaviour: behaviour.__name__)
def test_failures_are_counted_by_kind_and_stop_nothing(behaviour: Behaviour) -> None:
    kind, detail = FAILURES[behaviour]  # type: ignore[index]

    async def every_other(exchange: Exchange) -> None:
        await (behaviour if exchange.number % 2 else answering())(exchange)

    report, _ = measure(every_other, timeout_s=0.5 if behaviour is endless else 60.0)
    assert report.summary.errors == {kind: 2}
    assert report.summary.num_ok == 2
    assert detail in report.to_dict()["error_examples"][kind]
    assert report.summary.output_tokens == 10


def test_a_refused_connection_is_counted() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        report = bench_serve(Server(url=url, model="m"), load(), warmup=1)
    assert report.summary.errors == {"no connection": 4}
    assert report.summary.ttft_ms is None
    assert report.latencies()[0]["latency"] == "sent late ms"
    json.dumps(report.to_dict())


def test_the_record_holds_every_request_but_not_the_key() -> None:
    with serving(answering()) as served:
        server = Server(url=f"{served.url}/v1/", model="m", api_key="secret")
        data = bench_serve(server, load(), warmup=0).to_dict()
        assert {exchange.path for exchange in served.exchanges} == {"/v1/completions"}
        assert {exchange.headers["authorization"] for exchange in served.exchanges} == {"Bearer secret"}
    assert "secret" not in json.dumps(data) + repr(server)
    assert [record["index"] for record in data["requests"]] == [0, 1, 2, 3]
    assert data["arrivals"]["process"] == "closed loop"
    assert data["summary"]["ttft_ms"]["count"] == 4


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_urls_of_no_server_are_refused(url: str) -> None:
    with pytest.raises(FlextronError, match="is not a URL"):
        Server(url=url, model="m")


def test_a_bug_in_sending_is_no_failed_request() -> None:
    class Sender:
        async def __call__(self, request: Request, start: float, scheduled_s: float) -> Timeline:
            raise RuntimeError("a bug")

    plan = make_plan(load(), PromptMaker())
    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(drive(Sender(), plan.requests, concurrency=2))


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    measure(answering(), on_done=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

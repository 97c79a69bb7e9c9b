"""The whole benchmark: plan, warm up, drive, report."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from flextron.bench.client import Client, Server
from flextron.bench.metrics import Objectives
from flextron.bench.plan import Load, Request, make_plan
from flextron.bench.prompts import PromptMaker, token_counter
from flextron.bench.report import Report, make_report
from flextron.bench.runner import BenchmarkRun, drive
from flextron.errors import FlextronError
from flextron.progress import OnProgress

__all__ = ["bench_serve"]


async def _run(
    server: Server,
    warmup: list[Request],
    requests: tuple[Request, ...],
    concurrency: int | None,
    on_done: OnProgress,
) -> BenchmarkRun:
    client = Client(server)
    try:
        warmed = await drive(client.send, warmup, concurrency=1)
        if warmed.interrupted:
            return BenchmarkRun(timelines=(), num_unfinished=len(requests))
        return await drive(client.send, requests, concurrency=concurrency, on_done=on_done)
    finally:
        await client.close()


def bench_serve(
    server: Server,
    load: Load,
    *,
    objectives: Objectives | None = None,
    concurrency: int | None = None,
    warmup: int = 1,
    on_done: OnProgress = lambda done, total: None,
) -> Report:
    """Put a load on a server and report what its clients saw. Ctrl-C ends it early, with a report of what is done.

    Args:
        server: whom to ask.
        load: what to ask, and when.
        objectives: for attainment and goodput.
        concurrency: requests under way at once, at most; without arrival times 1 by default, otherwise no limit.
        warmup: requests sent one after another beforehand, which count for nothing.
        on_done: called with the number of requests that ended and of all.

    Raises:
        FlextronError: a value is out of range or a file is broken. Failing requests are counted, not raised.
    """
    if warmup < 0:
        raise FlextronError(f"the number of warm-up requests must not be negative, not {warmup}")
    objectives = objectives or Objectives()
    count = token_counter(load.tokenizer) if load.tokenizer else None
    make_prompt = PromptMaker(seed=load.seed, shared_prefix=load.shared_prefix, count=count)
    plan = make_plan(load, make_prompt)
    if concurrency is None and load.arrivals.rate is None and load.arrivals.trace is None:
        concurrency = 1
    warming = [
        replace(request, scheduled_s=None, prompt=make_prompt(f"warmup {i}", request.sizes.prompt))
        for i, request in enumerate(plan.requests[:warmup])
    ]
    run = asyncio.run(_run(server, warming, plan.requests, concurrency, on_done))
    return make_report(
        run, server=server, load=load, plan=plan, objectives=objectives, concurrency=concurrency, warmup=warmup
    )

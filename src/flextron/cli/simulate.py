"""`flextron simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flextron.bench.lengths import Limits
from flextron.bench.metrics import Objectives
from flextron.bench.plan import Arrivals, Load
from flextron.cli.console import Json, message, progress, show
from flextron.errors import FlextronError

__all__ = ["simulate"]


def simulate(
    machine: Annotated[
        Path,
        typer.Argument(help="Simulate this machine: a file of its numbers, or a profiled elastic checkpoint."),
    ],
    replicas: Annotated[
        str | None,
        typer.Option(help="Number of servers, or several such as 1,2,4. Default: as few as the objectives need."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Take arrival times and lengths from a CSV file in the format of Azure or BurstGPT."),
    ] = None,
    trace_start: Annotated[float, typer.Option(help="Seconds into the trace at which to start.")] = 0.0,
    trace_seconds: Annotated[
        float | None, typer.Option(help="Seconds of the trace to replay. Default: to its end.")
    ] = None,
    rescale: Annotated[float, typer.Option(help="Factor on the trace's rate.")] = 1.0,
    repeat: Annotated[int, typer.Option(help="Play the load so many times, one after the other.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, arriving at random. Default: 1 without a trace.")
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Shape of the gamma-distributed gaps between arrivals; 1 is Poisson, less is burstier."),
    ] = 1.0,
    num_requests: Annotated[
        int | None, typer.Option(help="Number of requests. Default: 1000, or all of a trace's slice.")
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths: N, A-B, exponential:MEAN or lognormal:MEDIAN:SIGMA.")
    ] = "256",
    output_tokens: Annotated[str, typer.Option(help="Output lengths, in the same form.")] = "128",
    dataset: Annotated[
        Path | None, typer.Option(help="Draw lengths from this CSV file instead; not with a trace.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Clip prompts to this many tokens.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Clip outputs to this many tokens.")] = None,
    max_total_tokens: Annotated[
        int | None,
        typer.Option(help="Clip prompt and output together to this many tokens. Default: the machine's context."),
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="TTFT objective.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="TPOT objective.")] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of the requests that is to meet the objectives, if replicas are searched.")
    ] = 0.95,
    min_latency_target: Annotated[
        float | None,
        typer.Option(help="Simulate also with requests narrowed under load, no further than this latency target."),
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option(
            help="Simulate also with finetuning beside, on examples of these lengths, such as lognormal:120:0.7."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in an optimizer step of that finetuning.")] = 8,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most sequences that run at once on a server. Default: the machine's.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens that an iteration computes. Default: the machine's.")
    ] = None,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(help="Memory for a checkpoint's KV cache, in gigabytes. Default: 1, or what the file says."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait on a server; more are refused.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.")] = 0,
    as_json: Json = False,
) -> None:
    """Play a load on simulated servers: the real scheduler and policies, in the time that a machine's numbers say."""
    from flextron.simulation import Scenario
    from flextron.simulation import simulate as run
    from flextron.simulation.profile import machine_of
    from flextron.simulation.report import rows

    numbers = None if replicas is None else _numbers(replicas)
    is_drawn = trace is None
    load = Load(
        arrivals=Arrivals(
            rate=1.0 if is_drawn and rate is None else rate,
            burstiness=burstiness,
            trace=trace,
            trace_start=trace_start,
            trace_seconds=trace_seconds,
            rescale=rescale,
        ),
        num_requests=1000 if is_drawn and num_requests is None else num_requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        dataset=dataset,
        limits=Limits(prompt=max_prompt_tokens, output=max_output_tokens, total=max_total_tokens),
        seed=seed,
    )
    scenario = Scenario(
        objectives=Objectives(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms),
        attainment=attainment,
        min_latency_target=min_latency_target,
        finetune=finetune,
        batch_size=batch_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        repeat=repeat,
    )
    found = machine_of(machine, kv_cache_gb)
    with progress("requests") as step:
        results = run(found, load, scenario, replicas=numbers, on_progress=step)
    show(
        rows(results),
        title=f"{found.name}: {results[0].load}, latencies in milliseconds",
        as_json=as_json,
        result={"machine": found.to_dict(), "results": [result.to_dict() for result in results]},
    )
    if results[0].num_clipped:
        message(f"note: {results[0].num_clipped:,} requests were clipped to the machine's context or the limits")


def _numbers(text: str) -> list[int]:
    """Numbers of replicas out of `1,2,4`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise FlextronError(f"replicas are whole numbers such as 4 or 1,2,4, not {text!r}") from None

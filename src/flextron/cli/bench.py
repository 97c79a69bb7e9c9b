"""`flextron bench`: measurements of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flextron.bench.lengths import Limits
from flextron.bench.metrics import Objectives
from flextron.bench.plan import Arrivals, Load
from flextron.cli.console import Json, message, progress, show
from flextron.errors import FlextronError
from flextron.files import new_file, write_json
from flextron.server.page.standalone import report_html

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Option(help="Name of the model on the server.")],
    url: Annotated[
        str, typer.Option(help="Send requests to the OpenAI-compatible server at this URL.")
    ] = "http://127.0.0.1:8000",
    endpoint: Annotated[str, typer.Option(help="Use the endpoint `completions` or `chat`.")] = "completions",
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, arriving at random. Default: a closed loop.")
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Shape of the gamma-distributed gaps between arrivals; 1 is Poisson, less is burstier."),
    ] = 1.0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Take arrival times and lengths from a CSV file in the format of Azure or BurstGPT."),
    ] = None,
    trace_start: Annotated[float, typer.Option(help="Seconds into the trace at which to start.")] = 0.0,
    trace_seconds: Annotated[
        float | None, typer.Option(help="Seconds of the trace to replay. Default: to its end.")
    ] = None,
    rescale: Annotated[float, typer.Option(help="Factor on the trace's rate.")] = 1.0,
    num_requests: Annotated[
        int | None, typer.Option(help="Number of requests. Default: 100, or all of a trace's slice.")
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths: N, A-B, exponential:MEAN or lognormal:MEDIAN:SIGMA.")
    ] = "256",
    output_tokens: Annotated[str, typer.Option(help="Output lengths, in the same form.")] = "128",
    dataset: Annotated[Path | None, typer.Option(help="Take lengths (.csv) or texts (.jsonl) from this file.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Clip prompts to this many tokens.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Clip outputs to this many tokens.")] = None,
    max_total_tokens: Annotated[
        int | None,
        typer.Option(help="Clip prompt and output together to this many tokens, the model's context length."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Make prompts of exact length with this tokenizer: directory or hub id.")
    ] = None,
    shared_prefix: Annotated[int, typer.Option(help="Tokens of a prefix that all prompts share.")] = 0,
    target: Annotated[
        str | None, typer.Option(help="Mix targets such as 1.0,0.6 with equal chances, sent as model@target.")
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="TTFT objective.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="TPOT objective.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Most requests in flight at once. Default: no limit; 1 in a closed loop.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for outputs of full length (vLLM, llama.cpp).")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600.0,
    warmup: Annotated[int, typer.Option(help="Requests to send before measuring starts.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths, targets and prompts.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(envvar="FLEXTRON_API_KEY", help="Send this key as bearer token.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write all figures and every request to this JSON file.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report with charts of the distributions to this HTML file, which loads nothing."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a load on any OpenAI-compatible server, and report latencies, throughput and goodput as clients see them."""
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise FlextronError("measuring servers needs httpx; install flextron[bench]") from error
    from flextron.bench.client import Server
    from flextron.bench.serve import bench_serve

    for file in (output, html):
        if file is not None and not file.parent.is_dir():
            raise FlextronError(f"{file.parent} is not a directory; make it first")
    load = Load(
        arrivals=Arrivals(
            rate=rate,
            burstiness=burstiness,
            trace=trace,
            trace_start=trace_start,
            trace_seconds=trace_seconds,
            rescale=rescale,
        ),
        num_requests=num_requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        dataset=dataset,
        targets=tuple(part.strip() for part in target.split(",")) if target else (),
        limits=Limits(prompt=max_prompt_tokens, output=max_output_tokens, total=max_total_tokens),
        shared_prefix=shared_prefix,
        tokenizer=tokenizer,
        seed=seed,
    )
    server = Server(
        url=url,
        model=model,
        endpoint=endpoint,
        api_key=api_key,
        temperature=temperature,
        ignore_eos=ignore_eos,
        timeout_s=timeout,
    )
    with progress("requests") as step:
        report = bench_serve(
            server,
            load,
            objectives=Objectives(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms),
            concurrency=concurrency,
            warmup=warmup,
            on_done=step,
        )
    if output is not None:
        write_json(output, report.to_dict())
    if html is not None:
        with new_file(html) as path:
            path.write_text(report_html(report.to_dict()), encoding="utf-8")
    show([report.facts()], title=f"{model} at {url}", as_json=as_json, result=report.to_dict(requests=False))
    if not as_json:
        show(report.latencies(), title="latencies in milliseconds", as_json=False)
        if report.by_target:
            show(report.targets(), title="by target", as_json=False)
    for warning in report.warnings():
        message(f"note: {warning}")
    if report.run.interrupted:
        raise typer.Exit(130)
    if not report.summary.num_ok:
        message(Text.assemble(("error:", "red"), " no request succeeded"))
        raise typer.Exit(1)

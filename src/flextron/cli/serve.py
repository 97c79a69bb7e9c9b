"""`flextron serve`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flextron import api
from flextron.api.engine import speculation_of
from flextron.cli.console import message, progress, warn_of_latencies
from flextron.engine import EngineSettings, follow
from flextron.errors import FlextronError
from flextron.jobs.jobs import JobsSettings
from flextron.kernels.decoder import Weights
from flextron.parallel.companions import check_ranks
from flextron.parallel.launcher import is_first_launched
from flextron.routing.device import Precision

__all__ = ["serve"]

_EXTRA = ("fastapi", "prometheus_client", "starlette", "uvicorn")


def serve(
    directory: Annotated[Path, typer.Argument(help="Serve this elastic checkpoint. `tiny` names the packaged model.")],
    host: Annotated[str, typer.Option(help="Listen on this address; 0.0.0.0 means all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name by which clients ask for the model. Default: the directory's name.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FLEXTRON_API_KEY",
            help="Key that clients must send. Default: no key is needed.",
            show_envvar=True,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also accept this host name, if the server listens on loopback; repeatable."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Let web pages of this origin use the server (CORS); * is any; repeatable."
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Number of completions that may wait while others run.")] = 128,
    max_body_mb: Annotated[float, typer.Option(help="Largest request body, in megabytes.")] = 8.0,
    max_tokens_limit: Annotated[
        int | None, typer.Option(help="Most tokens of a completion. Default: the model's context length.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens that an iteration computes.")] = 256,
    kv_cache_gb: Annotated[float, typer.Option(help="Memory for the KV cache, in gigabytes.")] = 1.0,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Do not reuse the KV cache of equal prefixes.")
    ] = False,
    weights: Annotated[Weights, typer.Option(help="Store the weights in float32, int8 or int4.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Serve on this device: cpu, cuda or cuda:N. Default: a GPU, if there is one.")
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Type of weights, activations and KV cache; float32 is the fastest on a CPU.")
    ] = "float32",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Share the model among this many ranks: a GPU each, or a part of the cores.")
    ] = 1,
    speculate: Annotated[
        Weights | None,
        typer.Option(help="Decode speculatively, with drafts in this precision: faster with few requests."),
    ] = None,
    slo_tpot_ms: Annotated[
        float | None,
        typer.Option(help="TPOT objective. Under load, requests are narrowed and training is throttled to meet it."),
    ] = None,
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(help="TTFT objective. Under load, requests are narrowed and training is throttled to meet it."),
    ] = None,
    min_latency_target: Annotated[
        float | None,
        typer.Option(
            help="Narrow requests no further than this latency target, unless they name one. Default: not at all."
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Measure latencies first, if the model has none of this device; not saved."),
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIRECTORY", help="Serve this adapter (in peft's layout) as well; repeatable."),
    ] = None,
    max_loaded_adapters: Annotated[int, typer.Option(help="Most adapters that are in memory at once.")] = 16,
    state_directory: Annotated[
        Path | None, typer.Option(help="Offer finetuning, and keep jobs, files and adapters here.")
    ] = None,
    max_training: Annotated[int, typer.Option(help="Most finetuning jobs that train at once; others wait.")] = 8,
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds to wait for running completions after a signal.")
    ] = 30.0,
    client_seconds: Annotated[
        float,
        typer.Option(help="Seconds that a client may take to send a request, or to read its response."),
    ] = 60.0,
    no_page: Annotated[bool, typer.Option("--no-page", help="Offer no web page at /.")] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Run this many equal servers behind the address, on Ray Serve.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Start up to so many replicas under load. Default: no more.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Run the replicas on this Ray cluster. Default: a Ray of their own, here.")
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI does, with a web page at /; the sub-network is chosen request by request."""
    try:
        from flextron.replicas.local import serve_replicas
        from flextron.replicas.plan import Plan
        from flextron.server.app import create_app
        from flextron.server.browsers import is_loopback
        from flextron.server.run import listen, told_address
        from flextron.server.run import serve as run
        from flextron.server.startup import missing_measurements, named_adapters, open_jobs
        from flextron.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise FlextronError(f"serving needs {error.name}; install it with: pip install 'flextron[serve]'") from error
    settings = ServerSettings(
        name=name or directory.expanduser().resolve().name,
        api_key=api_key,
        allowed_hosts=tuple(allowed_host or ()) if is_loopback(host) else None,
        allowed_origins=tuple(allowed_origin or ()),
        max_queue=max_queue,
        max_body_mb=max_body_mb,
        max_tokens_limit=max_tokens_limit,
        max_loaded_adapters=max_loaded_adapters,
        drain_seconds=drain_seconds,
        client_seconds=client_seconds,
        slo_tpot_ms=slo_tpot_ms,
        slo_ttft_ms=slo_ttft_ms,
        min_latency_target=min_latency_target,
        page=not no_page,
    )
    limits = JobsSettings(max_training=max_training)
    _check_together(tensor_parallel, profile=profile, trains=state_directory is not None)
    if tensor_parallel > 1 and (device is not None or dtype != "float32"):
        raise FlextronError(
            "ranks choose their devices themselves and run in float32; leave --device and --dtype out, or serve "
            "without --tensor-parallel"
        )
    if not is_first_launched():
        follow()
        return
    sizes = EngineSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_gb=kv_cache_gb,
        prefix_caching=not no_prefix_caching,
        weights=weights,
        tensor_parallel=tensor_parallel,
    )
    if replicas is None and (max_replicas is not None or ray_address is not None):
        raise FlextronError("--max-replicas and --ray-address go with --replicas; give it, too")
    if replicas is not None:
        if profile:
            raise FlextronError(
                "--profile would measure each replica differently; leave it out and run flextron profile before"
            )
        plan = Plan(
            directory=_absolute(directory),
            server=settings,
            engine=sizes,
            device=device,
            dtype=dtype,
            speculate=speculate,
            adapters=tuple(_absolute_adapter(given) for given in adapter or ()),
            state_directory=None if state_directory is None else _absolute(state_directory, made_later=True),
            jobs=limits,
            replicas=replicas,
            max_replicas=max_replicas,
        )
        serve_replicas(plan, host, port, ray_address, message)
        return
    message(f"loading {directory}")
    # ranks take their parts from the whole model, which need not fit on one device
    model = api.load(str(directory), device="cpu" if tensor_parallel > 1 else device, dtype=dtype)
    if profile:
        with progress("measuring latencies") as measure, progress("searching the frontier") as search:
            model.profile_here(on_measure=measure, on_search=search)
        warn_of_latencies(model)
    engine = replace(sizes, speculation=None if speculate is None else speculation_of(model, speculate))
    adapters = named_adapters(model, adapter or [], tensor_parallel)
    with ExitStack() as stack:
        jobs = None
        if state_directory is not None:
            jobs = open_jobs(
                model, state_directory, adapters, name=settings.name, source=str(directory), settings=limits
            )
            stack.callback(jobs.close)
        app = create_app(model, settings, engine, jobs, adapters)
        stack.callback(app.state.service.core.close)
        if (said := model.generation_defaults.complaint) is not None:
            message(said)
        sock = listen(host, port)
        for missing in missing_measurements(model):
            message(missing)
        if api_key is None and not is_loopback(host):
            message(f"anyone who reaches {host} may use the model; --api-key asks for a key")
        message(told_address(settings, host, sock))
        run(app, sock)


def _check_together(num_ranks: int, *, profile: bool, trains: bool) -> None:
    """Refuse early what does not go on these ranks."""
    check_ranks(num_ranks)
    if num_ranks > 1 and (profile or trains):
        raise FlextronError(
            f"{'--profile' if profile else '--state-directory'} needs the whole model in one process; leave it out"
            f"{' and run flextron profile before' if profile else ''}, or serve without --tensor-parallel"
        )


def _absolute(path: Path, *, made_later: bool = False) -> str:
    """The path for another process; a name that is no path, such as `tiny`, stays as it is."""
    found = path.expanduser()
    return str(found.resolve()) if made_later or found.exists() else str(path)


def _absolute_adapter(given: str) -> str:
    name, sign, directory = given.partition("=")
    return f"{name}{sign}{_absolute(Path(directory))}" if directory else given

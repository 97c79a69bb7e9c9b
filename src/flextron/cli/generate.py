"""`flextron generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flextron import api
from flextron.cli.console import Json, show
from flextron.cli.targets import named
from flextron.errors import FlextronError
from flextron.spec import Target

__all__ = ["generate"]


def generate(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint to run. `tiny` names the packaged model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    latency: Annotated[
        float | None, typer.Option(help="Run in at most this fraction of the full model's latency.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Run in at most this many milliseconds per token.")] = None,
    params: Annotated[int | None, typer.Option(help="Use at most this many parameters, embeddings included.")] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Use at most this many gigabytes for weights and KV cache.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of context whose KV cache counts for --memory-gb.")] = 2048,
    max_loss_increase: Annotated[float | None, typer.Option(help="Let the loss rise by at most this fraction.")] = None,
    router: Annotated[
        str | None, typer.Option(help="Use the `token` router, which routes each token by itself; with --latency.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: draw from the likeliest tokens that add up to this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    add_special_tokens: Annotated[
        bool, typer.Option(help="Begin the prompt with the special tokens that the tokenizer adds, such as BOS.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt in the sub-network for a target (the full one by default)."""
    target = named(
        latency=latency,
        latency_ms=latency_ms,
        params=params,
        memory_gb=memory_gb,
        max_loss_increase=max_loss_increase,
    )
    model = api.load(str(directory))
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    sampling["add_special_tokens"] = add_special_tokens
    if router not in (None, "token"):
        raise FlextronError(f"there is no router {router!r}; `token` is the only one to name")
    if router is not None:
        spec = model.routed(Target(**target))[0]
        text = model.generate(prompt, router="token", **target, **sampling)
    else:
        spec = model.select(**target, context=context) if target else model.space.full
        text = model.generate(prompt, spec=spec, **sampling)
    if as_json:
        show([], title="", as_json=True, result={"text": text, "subnet": spec.to_dict()})
    else:
        typer.echo(prompt + text)

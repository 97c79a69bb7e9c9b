"""`flextron generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flextron import api
from flextron.cli.console import Json, show
from flextron.errors import FlextronError
from flextron.spec import Target

__all__ = ["generate"]


def generate(
    directory: Annotated[Path, typer.Argument(help="Elastic checkpoint; `tiny` is in the package.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    latency: Annotated[float | None, typer.Option(help="Fraction of the full model's latency.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds per token.")] = None,
    params: Annotated[int | None, typer.Option(help="Parameters, embeddings included.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Gigabytes of weights, keys and values.")] = None,
    context: Annotated[int, typer.Option(help="Tokens that --memory-gb makes room for.")] = 2048,
    max_loss_increase: Annotated[float | None, typer.Option(help="Allowed rise of the loss, as a fraction.")] = None,
    router: Annotated[str | None, typer.Option(help="`token` routes each token by itself (with --latency).")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    add_special_tokens: Annotated[
        bool, typer.Option(help="Begin the prompt as the tokenizer begins a text (with BOS, for some).")
    ] = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt in the sub-network for a target (the full one by default)."""
    limits = {
        "latency": latency,
        "latency_ms": latency_ms,
        "params": params,
        "memory_gb": memory_gb,
        "max_loss_increase": max_loss_increase,
    }
    target: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
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

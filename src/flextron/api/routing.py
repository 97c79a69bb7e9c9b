"""Training a model's routers: what `ElasticModel.route` and `ElasticModel.route_tokens` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flextron.api.measured import MeasuredModel
from flextron.api.texts import (
    Texts,
    check_sequences,
    documents,
    evaluation_text,
    needed,
    sequences,
    source_name,
    training_text,
)
from flextron.errors import FlextronError
from flextron.parallel.processes import Processes
from flextron.progress import OnProgress, OnStep
from flextron.routing import Frontier, LatencyTable, compare_frontiers
from flextron.routing.frontier import FrontierPoint
from flextron.routing.token_router import TokenRouter
from flextron.texts.blocks import TokenBlocks, pack_tokens
from flextron.training.router_recipe import RouterRecipe
from flextron.training.routers import RouterResult, train_static_router
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.training.token_routing import TokenRouterResult, train_token_router

__all__ = ["ROUTE_TARGETS", "TOKEN_TARGETS", "route", "route_tokens"]

ROUTE_TARGETS = tuple(j / 40 for j in range(16, 41))
"""Latency fractions at which a static router's choices are measured."""
TOKEN_TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Latency fractions for which a token router is trained."""


def route(
    model: MeasuredModel,
    text: Texts,
    recipe: RouterRecipe | None,
    *,
    num_tokens: int,
    context: int,
    run_directory: Path | None,
    on_measure: OnProgress | None,
    on_round: OnStep | None,
    on_compare: OnProgress | None,
) -> tuple[RouterResult, Frontier]:
    """See `ElasticModel.route`; the router's training, and the frontier with what it chooses."""
    check_sequences(num_tokens, context)
    tokens_BT = sequences(
        documents(text, evaluation_text),
        model.tokenizer,
        num_tokens=2 * num_tokens,
        context=context,
        vocab_size=model.decoder.config.vocab_size,
    )
    half = max(1, len(tokens_BT) // 2)
    table = shared_latencies(model, on_measure)
    result = train_static_router(
        model.decoder, model.space, table, tokens_BT[:half], recipe, run_directory=run_directory, on_round=on_round
    )

    def compare() -> list[FrontierPoint]:
        return compare_frontiers(
            model.decoder,
            model.space,
            table,
            tokens_BT[half:],
            ROUTE_TARGETS,
            router=result.router,
            on_progress=on_compare,
        )

    points = Processes.join().shared(
        compare,
        lambda found: [point.to_dict() for point in found],
        lambda data: [FrontierPoint.from_dict(point) for point in data],
    )
    return result, Frontier.of(table.device, source_name(text, "pydoc topics"), points)


def shared_latencies(model: MeasuredModel, on_progress: OnProgress | None = None) -> LatencyTable:
    """The latency table of the first process's device, for all processes."""
    table = Processes.join().shared(
        lambda: model.measure_latencies(on_progress=on_progress), LatencyTable.to_dict, LatencyTable.from_dict
    )
    model.tables[table.name] = table
    return table


def route_tokens(
    model: MeasuredModel,
    text: Texts,
    recipe: TokenRouterRecipe | None,
    *,
    targets: Sequence[float],
    context: int,
    on_step: OnStep | None,
) -> tuple[TokenRouterResult, TokenRouter]:
    """See `ElasticModel.route_tokens`; what training did, and the router."""
    if Processes.join().are_several:
        raise FlextronError("a token router trains in one process; run route --token without a launcher")
    recipe = recipe or TokenRouterRecipe()
    specs = {target: model.select(latency=target) for target in targets}
    table = model.measure_latencies()
    held_out = recipe.heldout_blocks * context
    joint = recipe.joint_steps * recipe.batch_size * context
    tokens = pack_tokens(
        documents(text, training_text),
        needed(model.tokenizer),
        num_tokens=held_out + max(joint, recipe.warm_tokens),
        context=context,
        vocab_size=model.decoder.config.vocab_size,
    )
    blocks = TokenBlocks.from_tokens(tokens, context=context, seed=recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        router = TokenRouter.for_table(model.space, model.decoder.config.hidden_size, table)
    result = train_token_router(model.decoder, model.decoder, router, table, specs, blocks, recipe, on_step=on_step)
    return result, router

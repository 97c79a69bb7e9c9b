"""Train the router of a model that lies in a directory, and compare what it chooses with what others would."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from flextron.api import ElasticModel, Texts
from flextron.errors import FlextronError
from flextron.files import write_json
from flextron.parallel.processes import Processes
from flextron.training.router_recipe import RouterRecipe
from flextron.workflows.elastify import Progress, check_own
from flextron.workflows.figure import can_draw, draw_kinds

__all__ = ["comparison_rows", "run_route", "run_route_tokens"]

_KINDS = ("router", "uniform", "mix'n'match", "random")


def run_route(
    model: ElasticModel,
    directory: Path,
    recipe: RouterRecipe,
    progress: Progress,
    *,
    text: Texts = None,
    num_tokens: int = 1024,
    picture: Path | None = None,
) -> list[dict[str, Any]]:
    """Route, write routers and frontier into the directory, and the comparison where it is asked for.

    Returns:
        Rows for a table: at each latency, the loss of each kind of sub-network.

    Raises:
        FlextronError: as for `ElasticModel.route`, or matplotlib is missing.
    """
    if picture is not None and not can_draw():
        raise FlextronError("drawing needs matplotlib; pip install matplotlib, or go without a picture")
    run_directory = directory.with_name(directory.name + ".route")
    check_own(run_directory, ("losses.json", ".losses.json*"))
    with (
        progress("measuring latencies") as measure,
        progress("training the router") as training,
        progress("measuring its choices") as comparing,
    ):
        result = model.route(
            text,
            recipe,
            num_tokens=num_tokens,
            run_directory=run_directory,
            on_measure=measure,
            on_round=training,
            on_compare=comparing,
        )

    def write() -> None:
        model.save_routers(directory)
        model.save_profile(directory)
        shutil.rmtree(run_directory, ignore_errors=True)

    processes = Processes.join()
    processes.from_first(write)
    rows = comparison_rows(model)
    if picture is not None and processes.is_first:
        picture.mkdir(parents=True, exist_ok=True)
        facts = {"spearman": result.spearman, "surrogate_error": result.error, "num_measured": result.num_measured}
        frontier = _routed(model)
        write_json(picture / "frontier.json", {**facts, **frontier.to_dict()})
        draw_kinds(frontier.points, picture / "frontier.png", title=f"{directory.name} on {frontier.device}")
    return rows


def run_route_tokens(
    model: ElasticModel, directory: Path, progress: Progress, *, text: Texts = None
) -> list[dict[str, Any]]:
    """Train the token router around the static choices, and write it into the directory.

    Returns:
        Rows for a table: for each target, distance to the full model without and with the router, at equal cost.

    Raises:
        FlextronError: as for `ElasticModel.route_tokens`.
    """
    with progress("training the token router") as step:
        result = model.route_tokens(text, on_step=step)
    model.save_routers(directory)
    return [
        {"latency": t, "static_kl": kl, "routed_kl": result.routed_kl[t], "cost_over_target": result.cost_ratio[t]}
        for t, kl in sorted(result.static_kl.items(), reverse=True)
    ]


def _routed(model: ElasticModel) -> Any:
    if model.frontier is None:
        raise FlextronError("the model has no measured frontier yet; run model.route() (flextron route) first")
    return model.frontier


def comparison_rows(
    model: ElasticModel, targets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
) -> list[dict[str, Any]]:
    """The lowest loss of each kind of sub-network within each latency."""
    points = _routed(model).points
    rows = []
    for target in targets:
        row: dict[str, Any] = {"latency": target}
        for kind in _KINDS:
            losses = [p.loss for p in points if p.kind == kind and p.latency <= target]
            row[kind] = min(losses, default=None)
        rows.append(row)
    return rows

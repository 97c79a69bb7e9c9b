"""Pictures of frontiers: loss over latency, before and after training, and by how sub-networks were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from flextron.errors import FlextronError
from flextron.routing import Frontier, FrontierPoint

__all__ = ["can_draw", "draw_frontiers", "draw_kinds"]

_LINE = 64
"""Characters of a line of a title; so many fill the figure's width."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise FlextronError("drawing needs matplotlib; install flextron[demo]") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _set_title(figure: Any, title: str) -> None:
    """The whole title, in as many lines as it needs."""
    lines = wrap(title, _LINE)
    # a dollar sign would begin a formula
    text = figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=11)
    while text.get_window_extent().width > 0.98 * figure.bbox.width:  # wide letters
        text.set_fontsize(0.9 * text.get_fontsize())


def _finish(plt: Any, figure: Any, axes: Any, path: Path, title: str) -> None:
    axes.set(xlabel="decode latency, fraction of the full model's", ylabel="perplexity", yscale="log")
    _set_title(figure, title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def draw_kinds(points: Sequence[FrontierPoint], path: Path, *, title: str) -> None:
    """Draw sub-networks into one PNG, a colour for each way of choosing them.

    Raises:
        FlextronError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    for kind in sorted({p.kind for p in points}):
        mine = sorted((p for p in points if p.kind == kind), key=lambda p: p.latency)
        style = "o-" if kind == "router" else "x"
        axes.plot([p.latency for p in mine], [math.exp(p.loss) for p in mine], style, ms=5, label=kind)
    _finish(plt, figure, axes, path, title)


def draw_frontiers(frontiers: Mapping[str, Frontier], path: Path, *, title: str) -> None:
    """Draw frontiers into one PNG: every measured sub-network, and the line of the best.

    Raises:
        FlextronError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    for (name, frontier), colour in zip(frontiers.items(), ("tab:grey", "tab:blue", "tab:green"), strict=False):
        uniform = [p for p in frontier.points if p.kind == "uniform"]
        best = frontier.best()
        axes.plot([p.latency for p in best], [math.exp(p.loss) for p in best], "o-", ms=4, color=colour, label=name)
        axes.plot(
            [p.latency for p in uniform],
            [math.exp(p.loss) for p in uniform],
            "x",
            ms=6,
            color=colour,
            alpha=0.6,
            label=f"{name}, uniform widths",
        )
    _finish(plt, figure, axes, path, title)

"""The table and the picture of the alternatives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw_alternatives", "losses_where_beaten", "table_of"]

_MARKERS = {"float32": "o", "int8": "s", "int4": "^"}
_COLOURS = ("black", "tab:red", "tab:orange", "tab:green", "tab:blue")


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(rows[0]["losses"])


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows of one way and one precision, the fastest first."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: float(r["ms"])):
        curves.setdefault((row["name"], row["weights"]), []).append(row)
    return curves


def loss_at(curve: Sequence[Mapping[str, Any]], axis: str, limit: float, text: str) -> float:
    """The best loss within a limit of latency or memory; infinity where nothing is within."""
    return min((float(row["losses"][text]) for row in curve if row[axis] <= limit), default=math.inf)


def losses_where_beaten(rows: Sequence[Mapping[str, Any]], axis: str, text: str) -> list[dict[str, Any]]:
    """For each limit below the full network's in int8: ours in int8, the best of the others, and whether ours wins."""
    curves = _curves(rows)
    full = min(row[axis] for row in rows if row["name"] == "full network" and row["weights"] == "int8")
    elastic = [key for key in curves if key[0].startswith("elastic")]
    ours = [row for key in elastic if key[1] == "int8" for row in curves[key]]
    others = {key: c for key, c in curves.items() if key not in elastic}
    out = []
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):
        limit = share * full
        rivals = {" ".join(key): loss_at(c, axis, limit, text) for key, c in others.items()}
        best = min(rivals, key=rivals.__getitem__)
        own = loss_at(ours, axis, limit, text)
        out.append({"limit": limit, "ours": own, "best": best, "theirs": rivals[best], "wins": own <= rivals[best]})
    return out


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows, and at each limit who is best, in Markdown."""
    texts = _texts(rows)
    lines = [
        f"| network | weights | size | tokens | ms | MB | {' | '.join(texts)} |",
        f"|---|---|---|---|---|---|{'---|' * len(texts)}",
    ]
    for row in rows:
        losses = " | ".join(f"{row['losses'][text]:.3f}" for text in texts)
        lines.append(
            f"| {row['name']} | {row['weights']} | {row['size']:g} | {row['tokens']:,} | {row['ms']:.1f} | "
            f"{row['mem_mb']:.0f} | {losses} |"
        )
    for axis, unit in (("ms", "ms"), ("mem_mb", "MB")):
        for text in texts:
            lines += [
                "",
                f"Best within a limit of {unit}, {text}:",
                "",
                "| limit | ours, int8 | others | their loss | |",
            ]
            lines.append("|---|---|---|---|---|")
            for found in losses_where_beaten(rows, axis, text):
                verdict = "ours" if found["wins"] else "**theirs**"
                pair = f"{found['ours']:.3f} | {found['best']} | {found['theirs']:.3f}"
                lines.append(f"| {found['limit']:.1f} | {pair} | {verdict} |")
    return "\n".join(lines) + "\n"


def draw_alternatives(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss over latency and over memory, one row of panels for each text."""
    texts = _texts(rows)
    colours = dict(zip(dict.fromkeys(row["name"] for row in rows), _COLOURS, strict=False))
    figure, axes = plt.subplots(len(texts), 2, figsize=(11, 3.6 * len(texts)), dpi=120, layout="constrained")
    for line, text in zip(axes, texts, strict=True):
        for panel, axis, label in zip(line, ("ms", "mem_mb"), ("ms a token", "MB of weights"), strict=True):
            for (name, weights), curve in _curves(rows).items():
                panel.plot(
                    [row[axis] for row in curve],
                    [row["losses"][text] for row in curve],
                    marker=_MARKERS[weights],
                    linestyle="-" if weights == "int8" else ":",
                    color=colours[name],
                    label=f"{name}, {weights}",
                    ms=5,
                )
            panel.set(xlabel=label, ylabel=f"nats a token, {text}", xscale="log")
            panel.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize=6, ncol=2)
    figure.savefig(path)
    plt.close(figure)

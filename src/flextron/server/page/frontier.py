"""A frontier as the chart takes it, and as a file that stands alone: it opens anywhere, without a server."""

from __future__ import annotations

from typing import Any

from flextron.routing import Frontier
from flextron.server.page.standalone import standalone_html
from flextron.spec import SubnetSpec

__all__ = ["frontier_facts", "frontier_html"]


def frontier_facts(frontier: Frontier) -> dict[str, Any]:
    """A frontier for the chart; `best` tells the points that no other beats in latency and loss."""
    best = set(frontier.best())
    points = [point.to_dict() | {"best": point in best} for point in frontier.points]
    return {"device": frontier.device, "text": frontier.text, "points": points}


def frontier_html(frontier: Frontier, full: SubnetSpec, *, name: str) -> str:
    """The chart with values under the pointer, as one HTML file that loads nothing.

    Args:
        frontier: what was measured.
        full: the full network.
        name: name of the model, for the title.
    """
    data = {"name": name, "full": full.to_dict(), **frontier_facts(frontier)}
    return standalone_html("frontier.js", ("dom.js", "chart.js", "strip.js"), data)

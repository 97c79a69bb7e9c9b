"""A frontier as the chart takes it, and as a file that stands alone: it opens anywhere, without a server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from string import Template
from typing import Any

from flextron.routing import Frontier
from flextron.server.page.files import PREFIX, assets
from flextron.spec import SubnetSpec

__all__ = ["frontier_facts", "frontier_html"]

_MODULES = ("dom.js", "chart.js", "strip.js")
_LINKS = re.compile(r"^(import [^\n]*\n|export )", re.MULTILINE)


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
    folder = files(__package__) / "standalone"
    style = assets()[f"{PREFIX}page.css"].content.decode()
    # modules cannot name each other within one file: put together, they need not
    modules = [_LINKS.sub("", assets()[PREFIX + module].content.decode()) for module in _MODULES]
    script = "\n".join([*modules, (folder / "frontier.js").read_text("utf-8")])
    data = json.dumps({"name": name, "full": full.to_dict(), **frontier_facts(frontier)})
    page = Template((folder / "frontier.html").read_text("utf-8"))
    # "<" could end the element that holds the data
    shown = data.replace("<", "\\u003c")
    return page.substitute(style=style, script=script, data=shown, style_hash=_hash(style), script_hash=_hash(script))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

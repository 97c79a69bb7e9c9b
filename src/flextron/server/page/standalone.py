"""HTML files that stand alone: charts with values under the pointer, which open anywhere and load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from flextron.server.page.files import PREFIX, assets

__all__ = ["report_html", "standalone_html"]

_LINKS = re.compile(r"^(import [^\n]*\n|export )", re.MULTILINE)


def standalone_html(script: str, modules: tuple[str, ...], data: Mapping[str, Any]) -> str:
    """One file of the page's modules, a script that draws with them, and what it draws.

    Args:
        script: name of the script in `standalone`.
        modules: names of the page's modules that it uses, each after those that it uses itself.
        data: what it draws, as JSON.
    """
    folder = files(__package__) / "standalone"
    style = assets()[f"{PREFIX}page.css"].content.decode()
    # modules cannot name each other within one file: put together, they need not
    texts = [_LINKS.sub("", assets()[PREFIX + module].content.decode()) for module in modules]
    code = "\n".join([*texts, (folder / script).read_text("utf-8")])
    # "<" could end the element that holds the data
    shown = json.dumps(data).replace("<", "\\u003c")
    page = Template((folder / "page.html").read_text("utf-8"))
    return page.substitute(style=style, script=code, data=shown, style_hash=_hash(style), script_hash=_hash(code))


def report_html(report: Mapping[str, Any]) -> str:
    """The report of `flextron bench serve`: its tables, and how latencies are distributed.

    Args:
        report: the JSON form, each request included.
    """
    return standalone_html("report.js", ("dom.js", "chart.js", "lines.js"), report)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

"""The frontier as a file that stands alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from flextron import ElasticModel
from flextron.server.page.frontier import frontier_facts, frontier_html


def element(page: str, opening: str) -> str:
    """What an element holds."""
    return page.partition(opening)[2].partition("</")[0]


def test_the_file_holds_the_points_and_loads_nothing(model: ElasticModel) -> None:
    assert model.frontier is not None
    name = "</script><b>&"
    page = frontier_html(model.frontier, model.space.full, name=name)
    data = json.loads(element(page, '<script type="application/json" id="data">'))
    assert data == {"name": name, "full": model.space.full.to_dict(), **frontier_facts(model.frontier)}
    assert not re.search(r"(src|href)=|^import |^export ", page, re.MULTILINE)


def test_its_policy_allows_its_own_script_and_style_alone(model: ElasticModel) -> None:
    assert model.frontier is not None
    page = frontier_html(model.frontier, model.space.full, name="tiny")
    for kind, opening in (("script", '<script type="module">'), ("style", "<style>")):
        digest = base64.b64encode(hashlib.sha256(element(page, opening).encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page

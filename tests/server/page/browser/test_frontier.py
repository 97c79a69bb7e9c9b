"""The frontier's file, opened from the disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from flextron import ElasticModel
from flextron.server.page.frontier import frontier_html
from tests.server.page.browser.visit import expect

pytestmark = pytest.mark.browser


def test_values_are_shown_under_the_pointer(browser: Browser, model: ElasticModel, tmp_path: Path) -> None:
    assert model.frontier is not None
    file = tmp_path / "frontier.html"
    file.write_text(frontier_html(model.frontier, model.space.full, name="tiny"), "utf-8")
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    best = model.frontier.best()
    for i, point in enumerate(best):
        page.locator(".dot.best").nth(i).hover(force=True)
        expect(page.get_by_test_id("readout")).to_contain_text(f"perplexity {math.exp(point.loss):.3g}")
    page.get_by_role("slider").fill("0")
    expect(page.get_by_test_id("readout")).to_contain_text(f"{best[-1].latency_ms:g} ms a token")
    expect(page.locator("tbody tr")).to_have_count(len(best))
    context.close()
    assert errors == []

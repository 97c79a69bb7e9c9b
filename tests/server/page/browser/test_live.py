"""Live figures in a real browser."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser

from tests.server.page.browser.visit import expect, visiting
from tests.server.running import Running, wait_until

pytestmark = pytest.mark.browser


def test_figures_are_shown_while_they_are_looked_at(browser: Browser, server: Running) -> None:
    live = server.app.state.live
    with visiting(browser, server.url) as visit:
        assert not live.is_sampling
        visit.page.get_by_role("slider").fill("1")
        visit.make_answers_long()
        visit.ask("Once upon a time", 100)
        visit.tab("Live")
        tokens = visit.page.get_by_role("figure").filter(has_text="Tokens by target")
        expect(tokens.locator(".legend")).to_contain_text(re.compile(r"latency=0\.60 [1-9]"))
        running = visit.page.locator(".tiles div").filter(has_text="running")
        expect(running.locator("dd")).to_have_text("1")
        chart = visit.page.get_by_role("img", name=re.compile(r"^Time between tokens \(TPOT\): mean \d"))
        expect(chart).to_be_visible()
        assert live.is_sampling
        visit.tab("Models")
        wait_until(lambda: not live.is_sampling)


def test_metrics_are_linked(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        visit.tab("Live")
        with visit.page.context.expect_page() as opened:
            visit.page.get_by_role("link", name="All metrics").click()
        expect(opened.value.locator("body")).to_contain_text("vllm:num_requests_running")

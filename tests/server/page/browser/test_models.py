"""The tab of models: what is missing is measured from there."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from tests.server.page.browser.visit import expect, visiting
from tests.server.page.test_measure import model_from_elsewhere
from tests.server.running import running

pytestmark = pytest.mark.browser


def test_a_button_measures_and_latencies_can_be_asked_for(browser: Browser) -> None:
    with running(model_from_elsewhere()) as made, visiting(browser, made.url) as visit:
        units = visit.column().get_by_label("Unit")
        expect(units.locator("option[value=latency]")).to_have_count(0)
        visit.tab("Models")
        missing = visit.page.get_by_role("region", name="What is missing")
        expect(missing).to_contain_text("another machine, 96 threads")
        missing.get_by_role("button", name="Measure now").click()
        expect(missing).to_have_count(0)
        expect(visit.page.locator("#said")).to_have_text("measured")
        expect(visit.page.get_by_role("region", name="Latencies", exact=True)).to_contain_text("(this device)")
        visit.tab("Chat")
        expect(units).to_have_value("latency")
        visit.page.get_by_role("slider").fill("0")
        visit.ask("Once upon a time", 3)
        visit.wait_until_answered()
        expect(visit.figure("given")).to_contain_text("latency")


def test_a_failure_is_shown_and_can_be_tried_again(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_elsewhere()

    def profile_here() -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(model, "profile_here", profile_here)
    with running(model) as made, visiting(browser, made.url, allowed="500") as visit:
        visit.tab("Models")
        button = visit.page.get_by_role("button", name="Measure now")
        button.click()
        expect(visit.page.locator("#panel-models").get_by_role("alert")).to_contain_text("unexpected error")
        expect(button).to_be_enabled()

"""The report of `flextron bench serve` as a file, opened from the disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from flextron.bench.client import Server
from flextron.bench.metrics import Objectives
from flextron.bench.plan import Arrivals, Load
from flextron.bench.serve import bench_serve
from flextron.server.page.standalone import report_html
from tests.server.page.browser.visit import expect
from tests.server.running import Running

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("targets", [(), ("1", "0.5")], ids=["one target", "two targets"])
def test_tables_and_distributions(browser: Browser, server: Running, tmp_path: Path, targets: tuple[str, ...]) -> None:
    load = Load(arrivals=Arrivals(), num_requests=5, prompt_tokens="4", output_tokens="4", targets=targets)
    with ThreadPoolExecutor(1) as threads:  # playwright has an event loop in this one
        asked = Server(url=server.url, model="tiny")
        report = threads.submit(bench_serve, asked, load, objectives=Objectives(ttft_ms=20_000)).result()
    file = tmp_path / "report.html"
    file.write_text(report_html(report.to_dict()), "utf-8")
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    expect(page.get_by_role("heading")).to_have_text("Load on tiny")
    facts = page.get_by_role("region", name="Run")
    expect(facts).to_contain_text("5 answered of 5")
    expect(facts).to_contain_text("100 %")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(3 * (1 + len(report.by_target)))
    spread = report.summary.ttft_ms
    assert spread is not None
    expect(rows.first).to_contain_text(f"{spread.p50:.3g}")
    # each request is a step of its target's line
    lines = page.locator("figure").first.locator("polyline, circle.point")
    steps = lines.evaluate_all("all => all.map(line => line.points?.numberOfItems ?? 1)")
    assert sum(steps) == 5
    assert Axe().run(page).response["violations"] == []
    context.close()
    assert errors == []

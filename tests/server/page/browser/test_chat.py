"""The chat in a real browser, against the server's own interface."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from flextron import ElasticModel
from tests.server.page.browser.visit import Visit, expect, visiting
from tests.server.running import Running, running, wait_until

pytestmark = pytest.mark.browser

PROMPT = "Once upon a time"
UNITS = {"latency": "0.7", "latency_ms": "6.5", "params": "200000", "memory_gb": "0.0008", "max_loss_increase": "0.05"}


def greedy(visit: Visit) -> None:
    """Set the temperature to 0."""
    visit.page.get_by_text("Sampling and mode").click()
    visit.page.get_by_label("Temperature").fill("0")


def said(server: Running, target: dict[str, Any] | None = None, max_tokens: int = 12) -> dict[str, Any]:
    """What the interface answers, greedily."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    extra = {} if target is None else {"flextron": target}
    answer: dict[str, Any] = httpx.post(f"{server.url}/v1/chat/completions", json=body | extra, timeout=60).json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    return " ".join(str(answer["choices"][0]["message"]["content"]).split())


def shown(visit: Visit, number: int = 1) -> str:
    """A column's answer, without the page's own notes."""
    visit.wait_until_answered()
    texts = visit.answer(number).evaluate(
        "node => [...node.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('')"
    )
    return " ".join(texts.split())


def slide(visit: Visit, to: int, number: int = 1) -> None:
    visit.page.get_by_role("slider", name=f"Target of Column {number}").fill(str(to))


def test_the_slider_gives_the_text_of_another_target(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        greedy(visit)
        visit.ask(PROMPT, 12)
        whole, narrow = said(server), said(server, {"latency": 0.5})
        assert shown(visit) == text_of(whole)
        expect(visit.figure("given")).to_have_text("full model")
        slide(visit, 0)
        visit.column().get_by_role("button", name="Retry").click()
        expect(visit.figure("given")).to_have_text("latency 0.5")
        assert shown(visit) == text_of(narrow)
        assert text_of(narrow) != text_of(whole)
        expect(visit.figure("count")).to_have_text("12")
        expect(visit.figure("speed")).to_have_text(re.compile(r"^\d"))
        expect(visit.figure("first")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
        # as many bars as layers and halves of them, as high as the widths say
        spec, full = narrow["flextron"]["spec"], whole["flextron"]["spec"]
        for kind, key in (("mlp", "intermediate_size"), ("groups", "num_groups")):
            bars = visit.column().locator(f".strip .{kind}").evaluate_all("all => all.map(b => b.height.baseVal.value)")
            assert bars == pytest.approx([32 * a / b for a, b in zip(spec[key], full[key], strict=True)])


def test_routed_tokens_are_underlined_by_width(browser: Browser, server: Running, model: ElasticModel) -> None:
    assert model.token_router is not None
    target = {"latency": max(model.token_router.specs), "router": "token"}
    with visiting(browser, server.url) as visit:
        greedy(visit)
        column = visit.column()
        column.get_by_label("Target", exact=True).fill(str(target["latency"]))
        column.get_by_label("each token chooses").check()
        visit.ask(PROMPT, 12)
        visit.wait_until_answered()
        spans = visit.answer().locator(".share")
        body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
        more = {"temperature": 0, "flextron": target, "return_token_ids": True}
        choice = httpx.post(f"{server.url}/v1/chat/completions", json=body | more, timeout=60).json()["choices"][0]
        assert " ".join("".join(spans.all_text_contents()).split()) == " ".join(choice["message"]["content"].split())
        percents = [int(re.sub(r"\D.*", "", title)) for title in spans.evaluate_all("all => all.map(s => s.title)")]
        shares = choice["flextron"]["mlp_shares"]
        assert all(100 * min(shares) - 1 <= percent <= 100 * max(shares) + 1 for percent in percents)
        classes = spans.evaluate_all("all => all.map(s => Number(s.className.slice(-1)))")
        # the title is rounded, the class is not
        for percent, shown_as in zip(percents, classes, strict=True):
            assert min(4, (percent - 1) // 20) <= shown_as <= min(4, (percent + 1) // 20)
        expect(column.get_by_text("Each token's part of the MLPs")).to_be_visible()
        column.get_by_label("each token chooses").uncheck()
        column.get_by_role("button", name="Retry").click()
        visit.wait_until_answered()
        expect(visit.answer().locator(".share")).to_have_count(0)
        expect(column.get_by_text("Each token's part of the MLPs")).to_be_hidden()


def test_two_columns_answer_one_prompt_at_two_targets(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        greedy(visit)
        visit.page.get_by_label("Two columns").check()
        slide(visit, 1, number=2)
        visit.ask(PROMPT, 12)
        assert shown(visit, 1) == text_of(said(server))
        assert shown(visit, 2) == text_of(said(server, {"latency": 0.6}))
        expect(visit.figure("asked", 2)).to_have_text("latency 0.6")


def test_the_chart_is_pressed_where_a_point_is(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        for i, latency in enumerate(("0.5", "0.6", "0.8", "1")):
            # the best points are drawn by falling latency, as they are measured
            visit.column().locator(".dot.best").nth(3 - i).click(force=True)
            expect(visit.column().get_by_label("Target", exact=True)).to_have_value(latency)
            expect(visit.page.get_by_role("slider")).to_have_value(str(i))


@pytest.mark.parametrize("unit", UNITS)
def test_typed_targets_choose_what_the_page_says_beforehand(browser: Browser, server: Running, unit: str) -> None:
    with visiting(browser, server.url) as visit:
        column = visit.column()
        column.get_by_label("Unit").select_option(unit)
        column.get_by_label("Target", exact=True).fill(UNITS[unit])
        readout = column.get_by_test_id("readout").inner_text()
        visit.ask(PROMPT, 2)
        expect(visit.figure("given")).to_have_text(f"{unit} {UNITS[unit]}")
        assert f"{visit.figure('params').inner_text()} parameters" in readout
        answer = said(server, {unit: int(UNITS[unit]) if unit == "params" else float(UNITS[unit])}, max_tokens=1)
        assert f"{answer['flextron']['params'] / 1e3:.0f} k" == visit.figure("params").inner_text()


def test_a_target_that_nothing_reaches_is_said_before_and_after(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url, allowed="400") as visit:
        visit.column().get_by_label("Target", exact=True).fill("0.1")
        expect(visit.column().get_by_test_id("readout")).to_contain_text("spans 0.5 to 1")
        visit.ask(PROMPT, 2)
        expect(visit.answer().get_by_role("alert")).to_contain_text("no sub-network reaches latency=0.1")
        assert "400 (Bad Request)" in visit.errors[0]


def test_stop_in_the_middle_frees_the_engine_and_retry_goes_to_the_end(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        visit.make_answers_long()
        visit.ask(PROMPT, 100)
        expect(visit.figure("count")).to_have_text(re.compile(r"^[1-9]"))
        visit.page.get_by_role("button", name="Stop").click()
        expect(visit.answer()).to_contain_text("(stopped)")
        server.wait_until_idle()
        assert 0 < int(visit.figure("count").inner_text()) < 100
        visit.page.get_by_label("Most tokens").fill("5")
        visit.column().get_by_role("button", name="Retry").click()
        visit.wait_until_answered()
        expect(visit.figure("count")).to_have_text("5")
        expect(visit.column().locator(".turn.assistant")).to_have_count(1)


def test_escape_stops_and_a_conversation_goes_on(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit, visit.page.expect_request("**/v1/chat/completions"):
        visit.make_answers_long()
        visit.ask("One", 100)
        expect(visit.figure("count")).to_have_text(re.compile(r"^[1-9]"))
        visit.page.get_by_label("Prompt").press("Escape")
        expect(visit.answer()).to_contain_text("(stopped)")
        with visit.page.expect_request("**/v1/chat/completions") as caught:
            visit.ask("Two", 2)
        roles = [turn["role"] for turn in caught.value.post_data_json["messages"]]
        assert roles == ["user", "assistant", "user"]
        visit.page.get_by_role("button", name="New conversation").click()
        expect(visit.column().locator(".turn")).to_have_count(0)


def test_texts_are_continued(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url) as visit:
        greedy(visit)
        visit.page.get_by_role("combobox", name="Mode", exact=True).select_option("text")
        visit.ask(PROMPT, 8)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        wanted = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        assert shown(visit) == " ".join(wanted.split())


def test_copied_requests_give_the_same_answer(browser: Browser, server: Running) -> None:
    with visiting(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        greedy(visit)
        slide(visit, 0)
        visit.ask('It\'s "here" \\ and $HOME', 8)
        wanted = shown(visit)
        visit.column().get_by_role("button", name="Copy as curl").click()
        expect(visit.page.locator("#said")).to_have_text("copied")
        curl = visit.page.evaluate("navigator.clipboard.readText()")
        output = subprocess.run(["sh", "-c", curl + " -s"], capture_output=True, text=True, timeout=60, check=True)
        assert '"latency":0.5' in output.stdout
        visit.column().get_by_role("button", name="Copy as Python").click()
        expect(visit.page.locator("#said")).to_have_text("copied")
        program = visit.page.evaluate("navigator.clipboard.readText()")
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
        assert " ".join(ran.stdout.split()) == wanted


def test_what_load_narrowed_is_told(browser: Browser, model: ElasticModel) -> None:
    # an objective that nothing meets
    with running(model, slo_tpot_ms=0.001, min_latency_target=0.5) as made, visiting(browser, made.url) as visit:
        made.slow_down(0.02)
        visit.make_answers_long()
        visit.ask(PROMPT, 100)
        wait_until(lambda: made.service.cap < 1)
        visit.wait_until_answered()
        visit.column().get_by_role("button", name="Retry").click()
        expect(visit.figure("asked")).to_have_text("full model")
        expect(visit.figure("given")).to_have_text(re.compile(r"latency 0\.\d+ \(narrowed under load\)"))
        visit.page.get_by_role("button", name="Stop").click()

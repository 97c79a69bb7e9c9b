"""The page with a real model: the package's elastic SmolLM2."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

import flextron
from flextron.api.packaged import boxed_adapter
from flextron.errors import FlextronError
from flextron.workflows.demo import default_model
from tests.server.page.browser.test_chat import greedy, shown, slide
from tests.server.page.browser.visit import expect, visiting
from tests.server.running import running

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PROMPT = "Tell me about the sea."


@pytest.fixture(scope="module")
def smollm2() -> flextron.ElasticModel:
    try:
        model = flextron.load(default_model(), elastic=boxed_adapter())
    except FlextronError as error:
        pytest.skip(str(error))
    model.profile()
    return model


def test_two_targets_of_a_real_model(browser: Browser, smollm2: flextron.ElasticModel) -> None:
    assert smollm2.frontier is not None
    with running(smollm2) as made, visiting(browser, made.url) as visit:
        greedy(visit)
        visit.page.get_by_label("Two columns").check()
        rungs = sorted({point.latency for point in smollm2.frontier.best()})
        slide(visit, len(rungs) // 2, number=2)
        target = float(visit.column(2).get_by_label("Target", exact=True).input_value())
        visit.ask(PROMPT, 16)
        found = [shown(visit, 1), shown(visit, 2)]
        for text, flextron_key in zip(found, ({}, {"flextron": {"latency": target}}), strict=True):
            body: dict[str, Any] = {"model": made.service.catalog.name, "max_tokens": 16, "temperature": 0}
            body |= {"messages": [{"role": "user", "content": PROMPT}], **flextron_key}
            answer = httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=120).json()
            assert " ".join(answer["choices"][0]["message"]["content"].split()) == text
        assert found[0] != found[1]
        expect(visit.figure("params", 1)).to_have_text("135 M")

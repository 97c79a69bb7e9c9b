"""Finetuning in a real browser: from a dropped file to a chat with what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator

from flextron.finetuning.dataset import DatasetError, read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from tests.jobs.making import CONTEXT, jsonl, tokenizer
from tests.server.page.browser.visit import Visit, expect, visiting
from tests.server.running import Running
from tests.server.tuning import CHAT, Tuning
from tests.trained import trained_model

pytestmark = pytest.mark.browser

GOOD = {"prompt": "a", "completion": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BAD: list[Any] = [
    "{",
    "[]",
    "1",
    "null",
    {},
    {"prompt": "a"},
    {"prompt": "a", "completion": ""},
    {"prompt": "a", "completion": 1},
    {**GOOD, "more": 1},
    {"messages": TURNS},
    {"messages": []},
    {"messages": {}},
]
BAD_TURNS: list[Any] = [
    [],
    {},
    [1],
    TURNS[:1],
    TURNS[1:],
    [*TURNS, TURNS[0]],
    [{"role": "tool", "content": "a"}, TURNS[1]],
    [TURNS[0], {"role": "assistant", "content": ""}],
    [TURNS[0], {"role": "assistant", "content": None}],
    [TURNS[0], {"role": "assistant", "content": [{"text": 1}]}],
    [TURNS[0], {"role": "system", "content": "a"}, TURNS[1]],
    [TURNS[0], {**TURNS[1], "weight": 0}],
    [TURNS[0], {**TURNS[1], "weight": 2}],
    [TURNS[0], {**TURNS[1], "weight": True}],
    [{**TURNS[0], "weight": 1}, TURNS[1]],
    [TURNS[0], {**TURNS[1], "name": "x"}],
]
GOOD_TURNS: list[Any] = [
    TURNS,
    [{"role": "developer", "content": "a"}, *TURNS],
    [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS],
    [TURNS[0], {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]}],
]


def drop(visit: Visit, content: bytes, name: str = "train.jsonl", place: int = 0) -> Locator:
    """Drop a file from outside; gives what the page says of it."""
    script = """([text, name]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([text], name));
        return transfer;
    }"""
    transfer = visit.page.evaluate_handle(script, [content.decode(), name])
    box = visit.page.locator(".drop").nth(place)
    box.dispatch_event("drop", {"dataTransfer": transfer})
    return box.locator(".drop-state")


def begin(visit: Visit, suffix: str, **settings: float) -> Locator:
    """Start a job on conversations; gives its card."""
    visit.tab("Finetuning")
    expect(drop(visit, jsonl(CHAT))).to_contain_text(f"train.jsonl: {len(CHAT)} examples (conversations)")
    visit.page.get_by_label("Name of the adapter").fill(suffix)
    labels = {"epochs": "Epochs", "batch_size": "Batch size", "every": "Checkpoint every", "latency": "Train at"}
    for key, value in settings.items():
        visit.page.get_by_label(labels[key]).fill(str(value))
    visit.page.get_by_role("button", name="Start training").click()
    card = visit.page.locator(".job", has=visit.page.get_by_role("heading", name=suffix, exact=True))
    expect(card).to_be_visible()
    return card


def test_a_job_from_the_dropped_file_to_a_chat_beside_the_base(browser: Browser, tuned: Tuning) -> None:
    with visiting(browser, tuned.server.url) as visit:
        visit.tab("Finetuning")
        expect(drop(visit, jsonl(CHAT[:2]), "held-out.jsonl", place=1)).to_contain_text("2 examples")
        card = begin(visit, "yes-no", epochs=4, batch_size=2, every=3, latency=0.6)
        expect(card).to_have_attribute("data-status", "succeeded")
        expect(card.locator(".job-state")).to_contain_text("step 12 of 12")
        # the curves are the events' figures
        client = tuned.client()
        job = client.fine_tuning.jobs.list().data[0]
        assert job.model_extra is not None
        assert job.model_extra["flextron"]["spec"] == trained_model().select(latency=0.6).to_dict()
        events: list[Any] = [
            e.data for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"
        ]
        last = max(events, key=lambda data: data["step"])
        for name, key in (("training", "train_loss"), ("validation", "valid_loss")):
            expect(card.locator(".legend")).to_contain_text(f"{name} {float(format(last[key], '.3g')):g} nats")
        points = card.locator("polyline").first.get_attribute("points")
        assert points is not None
        assert len(points.split()) == 12
        assert card.locator(".adapters li").count() == 4
        card.get_by_role("button", name="Chat with").first.click()
        adapter = visit.column(2).get_by_role("combobox", name=re.compile("^Model")).input_value()
        assert adapter == client.fine_tuning.jobs.checkpoints.list(job.id).data[-1].fine_tuned_model_checkpoint
        visit.ask("Say yes", 4)
        visit.wait_until_answered()
        expect(visit.figure("params", 2)).to_contain_text(f"with {adapter}")
        expect(visit.figure("params", 1)).not_to_contain_text("with")


def test_pause_and_resume_and_cancel(browser: Browser, tuned: Tuning) -> None:
    with visiting(browser, tuned.server.url) as visit:
        card = begin(visit, "long", epochs=1000, batch_size=2)
        expect(card).to_have_attribute("data-status", "running")
        card.get_by_role("button", name="pause long").click()
        expect(card).to_have_attribute("data-status", "paused")
        client = tuned.client()
        assert client.fine_tuning.jobs.list().data[0].status == "paused"
        card.get_by_role("button", name="resume long").click()
        expect(card).to_have_attribute("data-status", "running")
        card.get_by_role("button", name="cancel long").click()
        expect(card).to_have_attribute("data-status", "cancelled")
        assert card.get_by_role("button").count() == 0


def test_an_adapter_is_deleted_once_that_is_confirmed(browser: Browser, tuned: Tuning) -> None:
    with visiting(browser, tuned.server.url) as visit:
        card = begin(visit, "short", epochs=1, batch_size=4)
        expect(card).to_have_attribute("data-status", "succeeded")
        delete = card.get_by_role("button", name="Delete")
        visit.page.once("dialog", lambda dialog: dialog.dismiss())
        delete.click()
        client = tuned.client()
        assert len(client.models.list().data) == len(tuned.server.service.catalog.ids()) + 1
        visit.page.once("dialog", lambda dialog: dialog.accept())
        delete.click()
        expect(card.locator(".adapters li")).to_have_count(0)
        assert len(client.models.list().data) == len(tuned.server.service.catalog.ids())


def test_mistakes_are_found_before_a_file_is_sent(browser: Browser, tuned: Tuning) -> None:
    with visiting(browser, tuned.server.url) as visit:
        visit.tab("Finetuning")
        state = drop(visit, jsonl([GOOD]) + b'\n{"prompt": "a"}\n' + jsonl([GOOD, {"messages": TURNS}]))
        expect(state).to_contain_text("line 3 must have a prompt and a completion")
        expect(state).to_contain_text("line 5 is of another kind than the first")
        expect(visit.page.get_by_role("button", name="Start training")).to_be_disabled()
        assert tuned.client().files.list().data == []
        expect(drop(visit, jsonl([GOOD]))).to_contain_text("1 examples (prompts with completions)")
        expect(visit.page.get_by_role("button", name="Start training")).to_be_enabled()


def line_of(path: Path, content: bytes) -> int | None:
    """The line that the server refuses; None if it takes the file, 0 if it names none."""
    path.write_bytes(content)
    try:
        read_dataset(path, tokenizer(), Hyperparameters(), CONTEXT)
    except DatasetError as error:
        words = str(error).split()
        return int(words[1]) if words[0] == "line" else 0
    return None


def test_the_page_refuses_the_lines_that_the_server_refuses(browser: Browser, server: Running, tmp_path: Path) -> None:
    cases = [jsonl([GOOD]) + (b.encode() if isinstance(b, str) else json.dumps(b).encode()) for b in BAD]
    cases += [jsonl([{"messages": TURNS}, {"messages": turns}]) for turns in (*BAD_TURNS, *GOOD_TURNS)]
    cases += [b"\xef\xbb\xbf" + jsonl([GOOD]), jsonl([GOOD]).replace(b"\n", b"\r\n"), b"\n\n" + jsonl([GOOD]) + b" \nx"]
    with visiting(browser, server.url) as visit:
        script = "async (texts) => (await import('/page/jsonl.js')) && texts.map((t) => window.checked(t))"
        visit.page.evaluate("async () => { window.checked = (await import('/page/jsonl.js')).checkExamples }")
        found = visit.page.evaluate(script, [case.decode() for case in cases])
    lines = [one["errors"][0]["line"] if one["errors"] else None for one in found]
    assert lines == [line_of(tmp_path / "data", case) for case in cases]
    assert sum(line is None for line in lines) == len(GOOD_TURNS) + 2

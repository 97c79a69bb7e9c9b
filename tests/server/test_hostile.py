"""A template that loops and a line without end: other requests go on meanwhile, and the server lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flextron.generation.templates import ChatTemplate
from tests.jobs.making import RECORDS, jsonl
from tests.server.running import Running, running
from tests.server.test_refusals import GOOD, assert_refused
from tests.server.tuning import tuning
from tests.trained import trained_model

TEMPLATE = (
    "{% set c = messages[0].content %}{% if c == 'loop' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if c == 'zero' %}{{ 1 / 0 }}{% elif c == 'index' %}{{ '{0}'.format() }}{% elif c == 'key' %}{{ '%(a)s' % {} }}"
    "{% elif c == 'recursion' %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{% elif c == 'raise' %}"
    "{{ raise_exception('no') }}{% elif c == 'memory' %}{{ 'a' * 10**10 }}{% elif c == 'long' %}{{ 'a' * 10**7 }}"
    "{% elif c == 'half' %}{{ '\\ud800' }}{% else %}{{ c }}{% endif %}"
)


SECONDS = 20.0
"""Enough for a busy machine to answer all others meanwhile."""


@pytest.fixture(scope="module")
def hostile() -> Iterator[Running]:
    model = trained_model()
    assert model.tokenizer is not None
    model.tokenizer.chat_template = TEMPLATE
    with running(model, template_seconds=SECONDS) as made:
        ChatTemplate.warm_up()
        yield made


def say(server: Running, content: str) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("content", ["zero", "index", "key", "recursion", "raise", "memory", "long", "half"])
def test_what_a_template_raises_is_a_400(hostile: Running, content: str) -> None:
    error = assert_refused(say(hostile, content), 400, "chat template")
    assert error["param"] == "messages"
    assert say(hostile, "fine").status_code == 200


def test_loops_hold_up_nobody(hostile: Running) -> None:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(say(hostile, "loop"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    with httpx.Client(base_url=hostile.url, timeout=30) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "fine"}], "max_tokens": 2}
        for ask in (
            lambda: client.get("/health"),
            lambda: client.post("/v1/completions", json=GOOD),
            lambda: client.post("/v1/chat/completions", json=body),
        ):
            assert ask().status_code == 200
    # one after the other, each would have waited for a loop
    assert not answers
    for thread in threads:
        thread.join(60)
    assert len(answers) == 3
    for answer in answers:
        assert_refused(answer, 400, "did not end within 20 s")


def test_an_endless_line_is_refused_at_once(hostile: Running, tmp_path: Path) -> None:
    with tuning(trained_model(), tmp_path / "state") as made, httpx.Client(base_url=made.server.url) as client:

        def upload(content: bytes) -> httpx.Response:
            files: Any = {"file": ("a.jsonl", content)}
            return client.post("/v1/files", files=files, data={"purpose": "fine-tune"}, timeout=60)

        good = jsonl(RECORDS)
        error = assert_refused(upload(good + b'{"prompt": "' + b"a" * 60_000_000), 400, f"line {len(RECORDS) + 1} ")
        assert (error["param"], error["code"]) == ("file", "line_too_long")
        assert_refused(upload(b"a" * 13_000_000 + b"\n" + good), 400, "line 1 ")
        assert client.get("/v1/files").json()["data"] == []
        # many lines are no long one
        assert upload(good * (13_000_000 // len(good))).status_code == 200
        assert client.get("/health").status_code == 200
        assert (
            client.post("/v1/files", files={"file": ("a", good)}, data={"purpose": "fine-tune", "x": "1"}).status_code
            == 400
        )


def test_a_line_with_too_many_characters_fails_its_job(tmp_path: Path) -> None:
    with tuning(trained_model(), tmp_path / "state") as made:
        client = made.client()
        file_id = made.upload(client, [{"prompt": "a" * 1_000_000, "completion": " b"}])
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
        job = made.wait(client, job.id, "failed")
        assert job.error is not None
        assert "line 1 has 1000002 characters" in job.error.message
        assert job.error.code == "invalid_training_file"

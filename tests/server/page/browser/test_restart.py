"""A server that is killed in the middle of an answer, and started again."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
from playwright.sync_api import Browser

from tests.server.page.browser.visit import expect, visiting
from tests.server.running import running
from tests.server.tuning import chat_model
from tests.trained import trained_model

pytestmark = pytest.mark.browser

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.server.tuning", "transformers.models.llama.configuration_llama"])


def _serve(port: int, ready: Connection) -> None:
    with running(chat_model(trained_model()), port=port) as made:
        made.slow_down(0.05)
        ready.send(made.url)
        threading.Event().wait()


@contextmanager
def started(port: int) -> Iterator[int]:
    """A server in a process of its own; gives the process's id. It is killed in any case."""
    here, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_serve, args=(port, theirs), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        with here:
            here.recv()
        yield process.pid
    finally:
        process.kill()
        process.join(20)


def test_a_server_that_is_killed_is_told_and_the_next_one_goes_on(browser: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with started(port) as pid, visiting(browser, url, allowed="net::ERR_") as visit:
        visit.make_answers_long()
        visit.ask("Once upon a time", 100)
        expect(visit.figure("count")).to_have_text(re.compile("^[1-9]"))
        os.kill(pid, signal.SIGKILL)
        expect(visit.answer().get_by_role("alert")).to_contain_text("broke off before the answer was complete")
        visit.ask("And then", 5)
        expect(visit.answer().get_by_role("alert")).to_contain_text("See whether it still runs, and try again.")
        visit.tab("Live")
        expect(visit.page.get_by_text("trying again every two seconds")).to_be_visible()
        with started(port):
            expect(visit.page.get_by_text("Connected: a sample a second.")).to_be_visible()
            visit.tab("Chat")
            visit.column().get_by_role("button", name="Retry").click()
            visit.wait_until_answered()
            expect(visit.figure("count")).to_have_text(re.compile("^[1-5]$"))
            expect(visit.answer().get_by_role("alert")).to_have_count(0)

"""Ctrl-C is held back once, in the main thread, and only where Python's own handler is set."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron.interrupts import Interrupted, held_interrupts


@pytest.fixture(autouse=True)
def pythons_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_held_and_the_second_is_not() -> None:
    with pytest.raises(KeyboardInterrupt), held_interrupts() as pressed:  # noqa: PT012
        assert not pressed()
        press()
        assert pressed()
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_says_what_is_going_on(capfd: pytest.CaptureFixture[str]) -> None:
    with held_interrupts():
        press()
    assert "Ctrl-C again ends at once" in capfd.readouterr().err


def test_other_handlers_are_left_alone() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    with held_interrupts() as pressed:
        press()
        assert not pressed()
    assert seen == [1]


def test_other_threads_hold_nothing() -> None:
    found: list[bool] = []

    def run() -> None:
        with held_interrupts() as pressed:
            found.append(pressed())
            found.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_its_text_says_where_the_state_is() -> None:
    error = Interrupted(3, 10, Path("elastic.run"))
    assert isinstance(error, KeyboardInterrupt)
    assert str(error).startswith("interrupted after step 3 of 10; the state is saved in elastic.run")

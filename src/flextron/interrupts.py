"""Ctrl-C between the steps of a long run: the running step ends, its state is saved, and then the run gives way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Interrupted", "held_interrupts"]


_STDERR = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after a state was saved; its text says where."""

    def __init__(self, done: int, total: int, directory: Path) -> None:
        """After `done` of `total` steps."""
        super().__init__(
            f"interrupted after step {done} of {total}; the state is saved in {directory}, "
            "and the same command goes on from there"
        )


@contextmanager
def held_interrupts(*, launched: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back, and give a function that tells whether it was pressed; the second time it ends at once.

    Where another handler than Python's own is set, or in another thread than the main one, nothing is held back.

    Args:
        launched: among several processes of a launcher. It passes on what the terminal may have sent already, and ends
            them with SIGTERM, so that is held back, too, and nothing ends at once.
    """
    pressed = threading.Event()

    def hold(*_: object) -> None:
        if pressed.is_set() and not launched:
            raise KeyboardInterrupt
        pressed.set()
        if not launched:
            # not through a stream, whose lock the interrupted code may have
            os.write(_STDERR, b"\nafter this step the state is saved; Ctrl-C again ends at once\n")

    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    if launched:
        usual[signal.SIGTERM] = signal.SIG_DFL
    in_main = threading.current_thread() is threading.main_thread()
    mine = [number for number, handler in usual.items() if in_main and signal.getsignal(number) is handler]
    for number in mine:
        signal.signal(number, hold)
    try:
        yield pressed.is_set
    finally:
        for number in mine:
            signal.signal(number, usual[number])

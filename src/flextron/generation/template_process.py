"""Runs chat templates, away from all else: a file that is started as a program of its own, by `templates`.

The process imports what rendering needs, once, and then forks a worker for each socket that it is sent. A worker
renders what comes in over its socket, until the other end is closed. A template that takes too long is ended by the
kernel's timer, whatever it is in the middle of, and one that wants too much memory gets none.

Imports nothing of this package, so that it starts as fast as it can; transformers itself renders, so that the text is
that of `apply_chat_template`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["receive", "send"]

_SIZE_BYTES = 8
_SPARE_BYTES = 1 << 29
"""Memory that a template may take beside what the process has already."""
_NICENESS = 5
_MOST_TOLD = 500
"""Characters of an error."""
_PIECE = 1 << 20

Render = Callable[..., Any]


def send(connection: socket.socket, message: Any) -> None:
    """Send a value that JSON can hold."""
    body = json.dumps(message).encode()
    connection.sendall(len(body).to_bytes(_SIZE_BYTES, "big") + body)


def receive(connection: socket.socket) -> Any:
    """What the other end has sent.

    Raises:
        EOFError: it is gone.
    """
    return json.loads(_exactly(connection, int.from_bytes(_exactly(connection, _SIZE_BYTES), "big")))


def _exactly(connection: socket.socket, size: int) -> bytes:
    kept = bytearray()
    while len(kept) < size:
        piece = connection.recv(min(_PIECE, size - len(kept)))
        if not piece:
            raise EOFError
        kept += piece
    return bytes(kept)


def _rendered(render: Render, asked: dict[str, Any]) -> dict[str, Any]:
    """The text, or what the template raised."""
    try:
        texts, _ = render(
            conversations=[asked["messages"]],
            tools=asked["tools"],
            chat_template=asked["template"],
            add_generation_prompt=asked["add_generation_prompt"],
            continue_final_message=asked["continue_final_message"],
            **asked["variables"],
        )
        text = str(texts[0])
        text.encode()
    except Exception as error:
        # jinja's own errors speak for themselves, Python's do not: `KeyError('a')` says 'a'
        told = str(error) if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {error}"
        return {"error": told[:_MOST_TOLD].encode(errors="replace").decode()}
    if len(text) > asked["max_chars"]:
        return {"error": f"it writes {len(text)} characters, more than {asked['max_chars']}"}
    return {"text": text}


def _work(connection: socket.socket, render: Render) -> None:
    """Render what is asked, until nobody asks."""
    while True:
        try:
            asked = receive(connection)
        except (EOFError, OSError):
            return
        # no handler: the kernel ends the process, even in the middle of an operation of Python's
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        answer = _rendered(render, asked)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            send(connection, answer)
        except OSError:
            return


def _limit_memory() -> None:
    """Let an allocation fail rather than the machine."""
    try:
        with open("/proc/self/statm") as numbers:
            used = int(numbers.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES, used + _SPARE_BYTES))
    except (OSError, ValueError):
        pass  # no Linux: only the time is limited


def _fork(control: socket.socket, render: Render) -> bool:
    """A worker for the next socket; False if there is none to come."""
    _, handles, _, _ = socket.recv_fds(control, 1, 1)
    if not handles:
        return False
    with socket.socket(fileno=handles[0]) as connection:
        if os.fork() == 0:
            try:
                control.close()
                # what loops shall not take the others' time
                os.nice(_NICENESS)
                _limit_memory()
                _work(connection, render)
            finally:
                os._exit(0)
    return True


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    # what the other process imports is what this one does
    sys.path[:] = receive(control)
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception as error:
        send(control, {"error": f"{type(error).__name__}: {error}"[:_MOST_TOLD]})
        return
    send(control, {})
    while _fork(control, render_jinja_template):
        pass


if __name__ == "__main__":
    _main()

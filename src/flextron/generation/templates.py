"""Chat templates: foreign code on foreign data, so they run in processes that can be given up (`template_process`).

The text is that of the tokenizer's `apply_chat_template`. Whatever a template does instead of writing one, even if it
loops forever, is a `TemplateError` after some seconds at most.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.generation import template_process
from flextron.generation.template_process import receive, send

__all__ = ["ChatTemplate", "TemplateError"]

_SECONDS = 5.0
_GRACE_SECONDS = 5.0
"""Time that the kernel gets to end what took too long."""
_START_SECONDS = 120.0
_DYING_SECONDS = 0.1
_MOST_CHARS = 1 << 24
_MOST_IDLE = 8


class TemplateError(FlextronError):
    """A template did not write a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A tokenizer's template and what it may read; callable from any thread."""

    template: str
    """The template, in Jinja."""
    variables: Mapping[str, Any]
    """Special tokens by their names."""
    seconds: float = _SECONDS
    """Time limit for one text."""
    max_chars: int = _MOST_CHARS
    """Most characters of one text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, has_tools: bool = False, **limits: Any) -> ChatTemplate | None:
        """A tokenizer's; None if it has none.

        Args:
            tokenizer: the tokenizer.
            has_tools: whether tools are offered, for which some tokenizers have a template of their own.
            limits: others of the fields.

        Raises:
            TemplateError: it has several, and none of them is for this.
        """
        if not tokenizer.chat_template:
            return None
        try:
            # the tools themselves do not count
            template = tokenizer.get_chat_template(tools=[{}] if has_tools else None)
            return cls(template=template, variables=tokenizer.special_tokens_map, **limits)
        except ValueError as error:
            raise TemplateError(str(error)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: with values that JSON can hold.
            add_generation_prompt: whether an answer is about to begin.
            continue_final_message: whether the last message stays open, to be continued.
            tools: functions that may be called, as OpenAI writes them.
            variables: more that the template may read.

        Raises:
            TemplateError: the template raises something, takes too long, or writes too much.
        """
        if not messages:
            raise TemplateError("there is no message")
        asked = {
            "messages": messages,
            "template": self.template,
            "variables": {**(variables or {}), **self.variables},
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "seconds": self.seconds,
            "max_chars": self.max_chars,
        }
        answer = _processes().ask(asked, self.seconds)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    @staticmethod
    def warm_up() -> None:
        """Start what rendering needs, which takes a second or two, before somebody waits for it."""
        _processes().warm_up()


@functools.cache
def _processes() -> _Processes:
    """One helper for all templates of this process: it holds nothing of theirs."""
    made = _Processes()
    atexit.register(made.close)
    return made


class _Processes:
    """The program that forks workers, and workers that wait for something to render."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._program: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[socket.socket] = []

    def warm_up(self) -> None:
        """Have a worker ready."""
        self._give_back(self._take())

    def ask(self, asked: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What a worker answers; an error if it ended before."""
        answer = self._ask_once(asked, seconds)
        # once more where it was not the template that ended the worker
        if answer is None:
            answer = self._ask_once(asked, seconds)
        return answer or {"error": "the process for chat templates ends again and again"}

    def _ask_once(self, asked: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The same; None if the program itself is gone."""
        worker = self._take()
        begun = time.monotonic()
        try:
            worker.settimeout(seconds + _GRACE_SECONDS)
            send(worker, asked)
            answer: dict[str, Any] = receive(worker)
        except (EOFError, OSError):
            worker.close()
            if time.monotonic() - begun >= seconds:
                return {"error": f"it did not end within {seconds:g} s"}
            if self._has_died():
                return None
            return {"error": "it ended its process, for example by taking too much memory"}
        if "error" in answer:
            # it may be short of memory, or deep in a recursion
            worker.close()
        else:
            self._give_back(worker)
        return answer

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._end()

    def _has_died(self) -> bool:
        with self._lock:
            if self._program is not None:
                try:
                    self._program.wait(_DYING_SECONDS)
                except subprocess.TimeoutExpired:
                    return False
                self._end()
            return True

    def _take(self) -> socket.socket:
        """A worker of one's own."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            try:
                return self._fork()
            except (EOFError, OSError):
                # the program is gone, by whatever hand: one more
                self._end()
                try:
                    return self._fork()
                except (EOFError, OSError) as error:
                    raise TemplateError(f"the process for chat templates does not start ({error!r})") from error

    def _give_back(self, worker: socket.socket) -> None:
        with self._lock:
            if self._control is not None and len(self._idle) < _MOST_IDLE:
                self._idle.append(worker)
            else:
                worker.close()

    def _fork(self) -> socket.socket:
        control = self._control or self._start()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(control, [b"f"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._control = ours
        with theirs:
            # -I: no module of the working directory is taken for a library's
            self._program = subprocess.Popen(
                [sys.executable, "-I", template_process.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for the server alone
                start_new_session=True,
                # threads do not survive a fork
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        ours.settimeout(_START_SECONDS)
        send(ours, sys.path)
        answer = receive(ours)
        if "error" in answer:
            self._end()
            raise TemplateError(f"the process for chat templates does not start ({answer['error']})")
        return ours

    def _end(self) -> None:
        for worker in self._idle:
            worker.close()
        self._idle.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._program is not None:
            self._program.kill()
            self._program.wait()
            self._program = None

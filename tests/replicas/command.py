"""`flextron serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

from tests.server.running import wait_until

__all__ = ["Command"]


class Command:
    """The command in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "flextron", "serve", *options, "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.said.append(line)

    def wait_for(self, text: str) -> str:
        wait_until(lambda: text in "".join(self.said) or self.process.poll() is not None, 120)
        assert text in "".join(self.said), self.said
        return "".join(self.said)

    def url(self) -> str:
        """Where it listens, once it does."""
        found = re.search(r"at (http://[\d.:]+)/v1", self.wait_for("(Ctrl-C ends it)"))
        assert found is not None
        return found[1]

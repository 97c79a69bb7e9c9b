"""llama.cpp beside us: finds an interpreter that has it, writes its model files, and talks to `llamacpp_peer.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.harness import LeftOutError
from flextron.workflows.demo import default_model

__all__ = ["LlamaCpp"]

_SCRIPT = Path(__file__).with_name("llamacpp_peer.py")
_files = tempfile.TemporaryDirectory(prefix="flextron-llamacpp-")
Kind = Literal["F32", "Q8_0", "Q4_0"]


def _interpreter() -> str:
    named = os.environ.get("LLAMA_CPP_PYTHON") or (sys.executable if find_spec("llama_cpp") else None)
    if named is None:
        raise LeftOutError(
            "llama.cpp is not here: `pip install llama-cpp-python` (compiles for minutes) into this environment, or "
            "into another one whose interpreter LLAMA_CPP_PYTHON names"
        )
    return named


@cache
def _gguf(kind: Kind) -> Path:
    """The demo's model in a precision of llama.cpp."""
    path = Path(_files.name) / f"{kind}.gguf"
    command = [_interpreter(), str(_SCRIPT), "quantize", default_model(), str(path), kind]
    subprocess.run(command, check=True, capture_output=True)
    return path


class LlamaCpp:
    """A process that holds a model; a context manager."""

    def __init__(self, kind: Kind | Path, num_slots: int = 1, slot_tokens: int = 512) -> None:
        """Start it, with as many threads as PyTorch has here.

        Args:
            kind: precision of the weights; or the path of another file, in float32 if that is part of its name (`F32`).
            num_slots: sequences that run side by side.
            slot_tokens: context of each.

        Raises:
            LeftOutError: llama.cpp is not here.
        """
        command = [
            _interpreter(),
            str(_SCRIPT),
            "serve",
            str(kind if isinstance(kind, Path) else _gguf(kind)),
            str(torch.get_num_threads()),
            str(num_slots),
            str(slot_tokens),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        features = self._read()["features"]
        self.features = ", ".join(f for f in features if f.startswith(("AVX", "NEON", "SVE"))) or "no vectors"
        """Vector instructions that it was compiled for."""

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of llama.cpp ended with code {self._process.wait()}")
        return json.loads(line)

    def _ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def step_seconds(self, prompt: list[int], steps: int) -> float:
        """Median time of a decode step; the first call reads the prompt, later ones go on from there."""
        return float(self._ask(prompt=prompt, steps=steps)["seconds"])

    def prompt_seconds(self, prompt: list[int]) -> float:
        """Time of a prompt and the first token after it."""
        return float(self._ask(prompt=prompt)["seconds"])

    def serve(self, requests: list[tuple[list[int], int]]) -> tuple[float, list[list[int]]]:
        """Seconds for all requests (prompt, tokens to generate), and the answers."""
        said = self._ask(requests=requests)
        return said["seconds"], said["answers"]

    def __enter__(self) -> LlamaCpp:
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

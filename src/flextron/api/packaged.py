"""What the package holds: `tiny`, wherever a checkpoint is asked for, and the elastic adapter of the demo."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["TINY", "boxed_adapter", "checkpoint_at", "tiny_model"]

TINY = "tiny"
"""Name of the packaged model. A directory of that name comes first, and a `Path` always means one."""


def tiny_model() -> Path:
    """Directory of the elastic model that the package holds."""
    return Path(str(files("flextron"))) / "assets"


def boxed_adapter() -> Path:
    """Directory of the elastic adapter for SmolLM2-135M-Instruct that the package holds."""
    return tiny_model() / "smollm2-135m-instruct"


def checkpoint_at(source: str | Path) -> str | Path:
    """Path of a source: the packaged model's if the string names it and nothing here has that name."""
    return tiny_model() if source == TINY and not Path(TINY).exists() else source

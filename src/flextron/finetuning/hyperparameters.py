"""Settings that a finetuning job may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from flextron.errors import FlextronError

__all__ = ["TARGET_MODULES", "Hyperparameters"]

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linears that an adapter may sit beside, by peft's names."""

_MOST = {"n_epochs": 1000, "batch_size": 4096, "rank": 1024, "max_tokens": 2**20, "checkpoint_every": 2**31}
_OPTIONAL = ("max_tokens", "checkpoint_every")
_MOST_NUMBER = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """OpenAI's three hyperparameters, and those of the adapter."""

    n_epochs: int = 3
    """Passes over the examples."""
    batch_size: int = 8
    """Examples of an optimizer step."""
    learning_rate_multiplier: float = 1.0
    """Factor on `learning_rate`."""
    learning_rate: float = 2e-4
    """Peak learning rate, before the multiplier."""
    rank: int = 16
    """Rank of the low-rank matrices."""
    alpha: float = 32.0
    """The adapter's output is scaled by `alpha / rank`."""
    target_modules: tuple[str, ...] = TARGET_MODULES
    """Linears that get an adapter. Default: all of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and
    `down_proj`."""
    max_tokens: int | None = None
    """Most tokens of an example. Default: the model's context length."""
    over_long: Literal["truncate", "refuse"] = "truncate"
    """What happens to a longer example: its end is cut off, or the job fails and names the line."""
    checkpoint_every: int | None = None
    """Steps between two intermediate adapters. Default: only the finished one is kept."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise FlextronError(f"{name} must be a whole number from 1 to {most}")
        for name in ("learning_rate_multiplier", "learning_rate", "alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST_NUMBER:
                raise FlextronError(f"{name} must be a number above 0, and at most {_MOST_NUMBER:g}")
        if not self.target_modules or not set(self.target_modules) <= set(TARGET_MODULES):
            raise FlextronError(f"target_modules must be some of {', '.join(TARGET_MODULES)}")
        if self.over_long not in ("truncate", "refuse"):
            raise FlextronError(f"over_long must be 'truncate' or 'refuse', not {str(self.over_long)[:50]!r}")

    def has_checkpoint(self, step: int) -> bool:
        """Whether an intermediate adapter is due after a step."""
        return self.checkpoint_every is not None and step % self.checkpoint_every == 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hyperparameters:
        """Read the JSON form; `"auto"` and null stand for the default.

        Raises:
            FlextronError: a key is unknown or a value is outside its range.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise FlextronError(f"there is no hyperparameter {unknown[0][:50]!r}; there are {', '.join(known)}")
        given = {k: v for k, v in values.items() if v is not None and v != "auto"}
        if "target_modules" in given:
            names = given["target_modules"]
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                raise FlextronError("target_modules must be a list of names")
            given["target_modules"] = tuple(names)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self) | {"target_modules": list(self.target_modules)}

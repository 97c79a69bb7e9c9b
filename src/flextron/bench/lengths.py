"""How long prompts and answers are: distributions by name, and the limits of the server's model."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from flextron.errors import FlextronError

__all__ = ["Lengths", "Limits", "Sizes"]

_FORMS = "N, A-B, exponential:MEAN or lognormal:MEDIAN:SIGMA"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Lengths of one request."""

    prompt: int
    """Tokens."""
    output: int
    """Tokens at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens."""

    kind: str
    """`fixed`, `uniform`, `exponential` or `lognormal`."""
    values: tuple[float, ...]
    """Its parameters: the length; both ends, included; the mean; the median and the logarithm's deviation."""

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read `512`, `128-1024`, `exponential:300` or `lognormal:200:1.1`.

        Raises:
            FlextronError: the text has none of these forms, or a value is impossible.
        """
        kind, colon, rest = text.partition(":")
        values: tuple[float, ...]
        try:
            if colon:
                values = tuple(float(part) for part in rest.split(":"))
            else:
                values = tuple(int(part) for part in text.split("-"))
                kind = "uniform" if len(values) == 2 else "fixed"
        except ValueError:
            raise FlextronError(f"lengths are given as {_FORMS}, not {text!r}") from None
        allowed = {"exponential": 1, "lognormal": 2} if colon else {"fixed": 1, "uniform": 2}
        if allowed.get(kind) != len(values):
            raise FlextronError(f"lengths are given as {_FORMS}, not {text!r}")
        if not all(0 < value < math.inf for value in values) or (kind == "uniform" and values[0] > values[1]):
            raise FlextronError(f"the lengths {text!r} must be positive, and the smaller one first")
        return cls(kind=kind, values=values)

    def draw(self, draws: random.Random) -> int:
        """One length, at least 1 token."""
        if self.kind == "fixed":
            return int(self.values[0])
        if self.kind == "uniform":
            return draws.randint(int(self.values[0]), int(self.values[1]))
        if self.kind == "exponential":
            return max(1, round(draws.expovariate(1 / self.values[0])))
        return max(1, round(draws.lognormvariate(math.log(self.values[0]), self.values[1])))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the server's model can hold; longer requests are clipped."""

    prompt: int | None = None
    """Tokens of a prompt."""
    output: int | None = None
    """Tokens of an answer."""
    total: int | None = None
    """Tokens of both: the model's context. The prompt gives way first."""

    def __post_init__(self) -> None:
        """Refuse limits that leave no room."""
        for name, value, least in (("prompt", self.prompt, 1), ("output", self.output, 1), ("total", self.total, 2)):
            if value is not None and value < least:
                raise FlextronError(f"the limit on {name} tokens must be at least {least}, not {value}")

    def clip(self, sizes: Sizes) -> Sizes:
        """The request, within the limits."""
        prompt, output = sizes.prompt, sizes.output
        if self.prompt is not None:
            prompt = min(prompt, self.prompt)
        if self.output is not None:
            output = min(output, self.output)
        if self.total is not None:
            output = min(output, self.total - 1)
            prompt = min(prompt, self.total - output)
        return Sizes(prompt=prompt, output=output)

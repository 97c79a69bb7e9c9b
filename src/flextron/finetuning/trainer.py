"""What a job needs of the numbers: a protocol, so that this package knows neither models nor optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flextron.errors import FlextronError
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.spec import SubnetSpec

__all__ = ["MakeTrainer", "StepMetrics", "Trainer", "TrainingTask", "not_finite"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step."""

    loss: float
    """Mean over the trained tokens, in nats."""
    num_tokens: int
    """Tokens that went through forward and backward, prompts included."""
    accuracy: float | None = None
    """Share of the trained tokens that were the likeliest; None where it was not measured."""
    valid_loss: float | None = None
    """Mean loss over the whole validation file after the step; None if it was not measured."""
    valid_accuracy: float | None = None
    num_valid_tokens: int = 0
    """Validation tokens that went through forward for it."""

    def check(self, step: int) -> None:
        """See that losses are numbers.

        Raises:
            FlextronError: one is not, after this step.
        """
        for name, loss in (("training", self.loss), ("validation", self.valid_loss)):
            if loss is not None and not math.isfinite(loss):
                raise not_finite(f"the {name} loss", loss, step)


def not_finite(what: str, value: float, step: int) -> FlextronError:
    """Training that went astray, with the remedy."""
    return FlextronError(
        f"{what} became {value} at step {step}; lower learning_rate or learning_rate_multiplier, "
        "or look for odd examples"
    )


class Trainer(Protocol):
    """Trains one adapter. Its steps can be cut into units of a chosen size, with anything between them.

    One thread at a time calls its methods.

    After `save_state` and a new start from that state, the same steps follow, to the bit where the device allows it.
    """

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all, at least 1."""

    @property
    def step_number(self) -> int:
        """Steps whose metrics were given, those before a restart included."""

    @property
    def unit(self) -> str:
        """Kind of the next unit; those of one kind take about the same time a token."""

    @property
    def num_left(self) -> int:
        """Tokens that the next unit can have at most."""

    def run(self, num_tokens: int) -> StepMetrics | None:
        """Run the next unit with at most so many tokens; the step's metrics if it was the step's last.

        Raises:
            FlextronError: as for `step`.
        """

    def step(self) -> StepMetrics:
        """Take one optimizer step, and score the validation examples if that is due.

        Raises:
            FlextronError: training cannot go on; the job fails with this message.
        """

    def save_state(self, directory: Path) -> None:
        """Write all that an exact resume needs into an empty directory."""

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter into an empty directory, as it is served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTask:
    """What a trainer is made for."""

    hyperparameters: Hyperparameters
    examples: Sequence[Example]
    """At least one, in the file's order."""
    validation: Sequence[Example] = ()
    """Scored at the end of each epoch, at each checkpoint and at the end."""
    seed: int
    """Seed of all that is random."""
    spec: SubnetSpec | None = None
    """The sub-network to train in; None for the full one."""
    resume: Path | None = None
    """A directory that `Trainer.save_state` wrote for the same task, where training goes on; None to begin."""


MakeTrainer = Callable[[TrainingTask], Trainer]
"""Makes a trainer; called by the thread that will take its steps.

It raises `FlextronError` where the hyperparameters do not go with the model; the job fails with this message.
"""

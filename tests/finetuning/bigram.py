"""A real trainer that is small enough to follow: least squares from each token to the next, by momentum SGD."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.trainer import StepMetrics, TrainingTask

__all__ = ["Bigram", "BigramMaker", "is_whole", "train_alone"]

SIZE = 32


class Bigram:
    """Tokens modulo 32; a fresh order in each epoch, drawn from the seed."""

    def __init__(self, task: TrainingTask, maker: BigramMaker) -> None:
        hyperparameters, resume = task.hyperparameters, task.resume
        self._examples, self._seed, self._maker = task.examples, task.seed, maker
        self._validation, self._chosen = task.validation, hyperparameters
        self._batch = hyperparameters.batch_size
        self._per_epoch = -(-len(task.examples) // self._batch)
        self.num_steps = self._per_epoch * hyperparameters.n_epochs
        self.weight_VV = torch.zeros(SIZE, SIZE, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.weight_VV], 0.5 * hyperparameters.learning_rate_multiplier, momentum=0.9)
        self.step_number = 0
        if resume is not None:
            state = load_file(resume / "state.safetensors")
            self.step_number = json.loads((resume / "step.json").read_text())["step"]
            self.weight_VV.data.copy_(state["weight"])
            self.optimizer.state[self.weight_VV]["momentum_buffer"] = state["momentum"]

    def step(self) -> StepMetrics:
        time.sleep(self._maker.seconds)
        if self._maker.fault is not None:
            raise self._maker.fault
        epoch, at = divmod(self.step_number, self._per_epoch)
        order = torch.randperm(len(self._examples), generator=torch.Generator().manual_seed(self._seed + epoch))
        chosen = [self._examples[i] for i in order[at * self._batch : (at + 1) * self._batch]]
        loss = self._loss(chosen)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step_number += 1
        is_due = self.step_number % self._per_epoch == 0 or self._chosen.has_checkpoint(self.step_number)
        return StepMetrics(
            loss=float(loss.detach()),
            num_tokens=sum(len(example.tokens) for example in chosen),
            valid_loss=float(self._loss(self._validation).detach()) if self._validation and is_due else None,
        )

    def _loss(self, examples: Sequence[Example]) -> Tensor:
        pairs = torch.tensor(
            [
                (example.tokens[i - 1] % SIZE, example.tokens[i] % SIZE)
                for example in examples
                for i in range(1, len(example.tokens))
                if example.mask[i]
            ]
        )
        wanted = torch.nn.functional.one_hot(pairs[:, 1], SIZE)
        return (self.weight_VV[pairs[:, 0]] - wanted).square().sum(1).mean()

    @property
    def unit(self) -> str:
        return "step"

    @property
    def num_left(self) -> int:
        return 1

    def run(self, num_tokens: int) -> StepMetrics:
        return self.step()

    def save_state(self, directory: Path) -> None:
        momentum: Tensor = self.optimizer.state[self.weight_VV].get("momentum_buffer", torch.zeros(SIZE, SIZE))
        save_file({"weight": self.weight_VV.detach(), "momentum": momentum}, directory / "state.safetensors")
        self._dawdle()
        (directory / "step.json").write_text(json.dumps({"step": self.step_number}))

    def save_adapter(self, directory: Path) -> None:
        save_file({"weight": self.weight_VV.detach()}, directory / "adapter_model.safetensors")
        self._dawdle()
        (directory / "adapter_config.json").write_text(json.dumps({"step": self.step_number}))

    def _dawdle(self) -> None:
        """In the middle of writing: time to be killed, or for the disk to fill."""
        time.sleep(self._maker.seconds)
        if self._maker.disk_is_full.is_set():
            # the system's own word for it
            Path("/dev/full").write_bytes(b"\0")


class BigramMaker:
    """Makes trainers, and lets tests meddle with them."""

    def __init__(self, seconds: float = 0.0) -> None:
        """Every step takes so much longer."""
        self.seconds = seconds
        self.fault: Exception | None = None
        self.disk_is_full = threading.Event()

    def __call__(self, task: TrainingTask) -> Bigram:
        return Bigram(task, self)


def train_alone(hyperparameters: Hyperparameters, examples: Sequence[Example], seed: int) -> tuple[list[float], Tensor]:
    """Losses and weights of an undisturbed training."""
    trainer = BigramMaker()(TrainingTask(hyperparameters=hyperparameters, examples=examples, seed=seed))
    losses = [trainer.step().loss for _ in range(trainer.num_steps)]
    return losses, trainer.weight_VV.detach()


def is_whole(directory: Path, step: int) -> bool:
    """Whether a directory holds all of the adapter after a step."""
    config = json.loads((directory / "adapter_config.json").read_text())
    return config == {"step": step} and load_file(directory / "adapter_model.safetensors")["weight"].shape == (32, 32)

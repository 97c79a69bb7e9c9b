"""Trains the LoRA adapter of a job, in units of work that fit between a server's iterations.

A step is a batch of examples, packed side by side. Each pack goes forward and backward (`finetuning/packs.py`), then
the optimizer takes its step: AdamW, clipped gradients, a rate that rises for a few steps and then falls to zero. Where
it is due, the validation examples go forward after that, as a part of the step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flextron.checkpoints.peft.writing import write_adapter
from flextron.errors import FlextronError
from flextron.finetuning.hyperparameters import TARGET_MODULES
from flextron.finetuning.packs import Pass, epoch_order
from flextron.finetuning.recompute import KEEPABLE, num_keepable
from flextron.finetuning.trainer import StepMetrics, TrainingTask, not_finite
from flextron.model.adapter import Adapter, linear_shapes
from flextron.model.bypass import Lora
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.model.device import wait_for
from flextron.spec import SubnetSpec

__all__ = ["UPDATE", "LoraTrainer", "LoraTrainers"]

UPDATE = "update"
"""The unit in which the optimizer takes its step; its tokens are one."""
_WARM_UP = 0.03
_MOST_NORM = 1.0
_STEP_TOKENS = 1024
"""Tokens of a unit when nothing waits for it."""
_TENSORS, _STATE = "tensors.safetensors", "state.json"


class LoraTrainers:
    """Makes trainers for the jobs of one model; see `flextron.finetuning.trainer.MakeTrainer`."""

    def __init__(
        self,
        decoder: Decoder,
        base_model: str,
        *,
        pack_tokens: int = 1024,
        saved_gb: float = 1.0,
    ) -> None:
        """Take the model.

        Args:
            decoder: frozen; others may use it at the same time.
            base_model: its name, for the adapters' configs.
            pack_tokens: tokens of examples that are run side by side, unless a single one has more.
            saved_gb: what may be kept of a pack to save time, 10^9 bytes. Without that, a quarter of it is.
        """
        self.decoder, self.base_model = decoder, base_model
        self.pack_tokens, self.saved_gb = pack_tokens, saved_gb

    def __call__(self, task: TrainingTask) -> LoraTrainer:
        """See `MakeTrainer`."""
        return LoraTrainer(self, task)

    def kept(self, spec: SubnetSpec, num_tokens: int) -> frozenset[str]:
        """What is kept of a pack of so many tokens in a sub-network, instead of computed again."""
        num_bytes = num_keepable(self.decoder.config, spec) * num_tokens * self.decoder.dtype.itemsize
        return KEEPABLE if num_bytes <= self.saved_gb * 1e9 else frozenset()


class LoraTrainer:
    """One job; see `flextron.finetuning.trainer.Trainer`. `run` takes a step unit by unit."""

    def __init__(self, made_by: LoraTrainers, task: TrainingTask) -> None:
        """Begin, or go on where a state ends.

        Raises:
            FlextronError: the model has none of the linears, or the state is of another job.
        """
        self._made_by, self._task, self._chosen = made_by, task, task.hyperparameters
        hyperparameters, config = task.hyperparameters, made_by.decoder.config
        self._spec = task.spec or config.full_spec
        # units of different widths take different times
        self._suffix = "" if self._spec == config.full_spec else f" in {num_parameters(config, self._spec)} parameters"
        named = {name.removesuffix("_proj") for name in hyperparameters.target_modules}
        present = linear_shapes(config, config.full_spec.layers[0]).keys()
        if hyperparameters.target_modules == TARGET_MODULES:
            named &= present
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            self.adapter = Adapter.lora(
                config, rank=hyperparameters.rank, alpha=hyperparameters.alpha, targets=sorted(named)
            ).to(made_by.decoder.device)
        _leave_out(self.adapter, self._spec)
        self._parameters = dict(self.adapter.named_parameters())
        self._rate = hyperparameters.learning_rate * hyperparameters.learning_rate_multiplier
        self._optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=self._rate, weight_decay=0.0, fused=True)
        self._num_updates = 0
        self._pass: Pass | None = None
        """The pass over the step's examples or, after its update, over those of the validation."""
        self._taken: StepMetrics | None = None
        """What a step whose update was made has measured, while its validation goes on."""
        if task.resume is not None:
            self._load(task.resume)
        self._begin()

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return self._chosen.n_epochs * self._steps_of_epoch

    @property
    def step_number(self) -> int:
        """See `Trainer`; a step is not taken while its validation goes on."""
        return self._num_updates - (self._taken is not None)

    @property
    def _steps_of_epoch(self) -> int:
        return -(-len(self._task.examples) // self._chosen.batch_size)

    @property
    def unit(self) -> str:
        """Kind of the next unit; units of one kind take about the same time a token."""
        if self._pass is None or self._pass.unit is None:
            return UPDATE
        return self._pass.unit + self._suffix

    @property
    def num_left(self) -> int:
        """Tokens that the next unit has at most."""
        return self._pass.num_left if self._pass is not None and self._pass.unit is not None else 1

    def run(self, num_tokens: int) -> StepMetrics | None:
        """Run the next unit, with at most so many tokens; the step's metrics if it was the step's last.

        Raises:
            FlextronError: the loss is no number; the adapter stays as it was before this step.
        """
        assert self._pass is not None
        if self._pass.unit is not None:
            self._pass.run(num_tokens)
            wait_for(self._made_by.decoder.device)  # units are timed
            if self._taken is None or self._pass.unit is not None:
                return None
            found = self._pass
            metrics = replace(
                self._taken,
                valid_loss=found.loss,
                valid_accuracy=found.accuracy,
                num_valid_tokens=found.num_tokens,
            )
            self._taken = None
        else:
            metrics = self._update()
            if self._task.validation and self._is_due(self._num_updates):
                self._taken = metrics
        self._begin()
        return None if self._taken is not None else metrics

    def step(self) -> StepMetrics:
        """Take a whole step; see `Trainer`."""
        while True:
            metrics = self.run(_STEP_TOKENS)
            if metrics is not None:
                return metrics

    def save_state(self, directory: Path) -> None:
        """See `Trainer`; a step that has begun is begun again, and so is its validation."""
        tensors = {f"adapter.{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            for key, value in self._optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value
        save_file({key: t.contiguous() for key, t in tensors.items()}, directory / _TENSORS)
        taken = None if self._taken is None else asdict(self._taken)
        state = {"step_number": self._num_updates, "num_steps": self.num_steps, "taken": taken}
        (directory / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def save_adapter(self, directory: Path) -> None:
        """See `Trainer`; in peft's layout."""
        write_adapter(self.adapter, directory, base_model=self._made_by.base_model, overwrite=True)

    def _load(self, directory: Path) -> None:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(directory / _TENSORS)
        wanted = {f"adapter.{name}": p.shape for name, p in self._parameters.items()}
        if state["num_steps"] != self.num_steps or any(
            key not in tensors or tensors[key].shape != shape for key, shape in wanted.items()
        ):
            raise FlextronError("the saved state is of a job with other examples or hyperparameters; begin anew")
        self._num_updates = int(state["step_number"])
        # states of earlier versions know of no validation
        self._taken = None if state.get("taken") is None else StepMetrics(**state["taken"])
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(tensors[f"adapter.{name}"])
                moments = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                if all(m is not None for m in moments.values()):
                    self._optimizer.state[p] = {key: m.to(p.device) for key, m in moments.items() if m is not None}

    def _is_due(self, step: int) -> bool:
        """Whether the validation examples are scored after a step."""
        return step % self._steps_of_epoch == 0 or self._chosen.has_checkpoint(step)

    def _begin(self) -> None:
        """Lay out the next step, or the validation of the one that was taken."""
        made_by = self._made_by
        if self._taken is not None:
            self._pass = Pass(
                made_by.decoder,
                self.adapter,
                self._task.validation,
                made_by.pack_tokens,
                spec=self._spec,
                backward=False,
            )
            return
        self._pass = None
        if self._num_updates == self.num_steps:
            return
        epoch, index = divmod(self._num_updates, self._steps_of_epoch)
        order, size = epoch_order(len(self._task.examples), epoch, self._task.seed), self._chosen.batch_size
        batch = [self._task.examples[i] for i in order[index * size : (index + 1) * size]]
        self._pass = Pass(
            made_by.decoder,
            self.adapter,
            batch,
            made_by.pack_tokens,
            spec=self._spec,
            kept=partial(made_by.kept, self._spec),
        )

    def _update(self) -> StepMetrics:
        assert self._pass is not None
        found = self._pass
        metrics = StepMetrics(loss=found.loss, num_tokens=found.num_tokens, accuracy=found.accuracy)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _share_of_rate(self._num_updates, self.num_steps)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), _MOST_NORM)
        if not torch.isfinite(norm):
            raise not_finite(f"the gradients (at loss {found.loss:g})", float(norm), self._num_updates + 1)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_updates += 1
        return metrics


@torch.no_grad()
def _leave_out(adapter: Adapter, spec: SubnetSpec) -> None:
    """Zero what reads neurons and heads that a sub-network does not have: it would stay as it was drawn."""
    for i, widths in enumerate(spec.layers):
        shapes, bypasses = linear_shapes(adapter.config, widths), adapter.at(i)
        for target in bypasses.keys() & {"o", "down"}:
            bypass = bypasses[target]
            assert isinstance(bypass, Lora)
            bypass.a[shapes[target].inputs if target in shapes else 0 :] = 0


def _share_of_rate(step: int, num_steps: int) -> float:
    """Rises linearly to 1 over the first steps, then falls linearly to 0 after the last."""
    warm = max(1, round(_WARM_UP * num_steps))
    return (step + 1) / warm if step < warm else (num_steps - step) / max(1, num_steps - warm)

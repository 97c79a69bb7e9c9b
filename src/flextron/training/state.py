"""Training state on disk, from which a killed run goes on as if nothing had happened: safetensors and JSON, no pickle.

Data order, sub-networks and token choice depend on the step alone, so parameters, AdamW's moments and the step are all
there is to save.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.files import checked, new_directory, read_json, write_json
from flextron.routing.sensitivity import Sensitivity

__all__ = ["RunDirectory"]


class _RunFile(BaseModel):
    """`run.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    step: Annotated[int, Field(ge=0, le=2**53)]
    identity: dict[str, Any]
    history: list[dict[str, float]]


_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory in which a training run keeps its state; a run of another recipe or text does not go on from it."""

    path: Path
    identity: dict[str, Any]
    """What must be equal for a resumed run to be the same run: recipe, text, model, and what the model had learnt."""

    @property
    def _state(self) -> Path:
        return self.path / "state"

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, float]]
    ) -> None:
        """Replace the saved state by one after `step` steps, in one move."""
        names = {id(p): name for name, p in model.named_parameters()}
        moments = {
            f"{names[id(p)]}:{key}": optimizer.state[p][key].contiguous()
            for group in optimizer.param_groups
            for p in group["params"]
            for key in _MOMENTS
            if p in optimizer.state
        }
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        with new_directory(self._state, overwrite=True) as temporary:
            save_file(trained, temporary / "model.safetensors")
            save_file(moments, temporary / "optimizer.safetensors")
            write_json(temporary / "run.json", {"step": step, "identity": self.identity, "history": history})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, float]]] | None:
        """Restore the saved state, if there is one.

        Returns:
            Steps done and the history of their losses; None without a state.

        Raises:
            FlextronError: the state is of another run, or damaged.
        """
        if not self._state.exists():
            return None
        run = self._read()
        if run.identity != self.identity:
            changed = sorted(k for k in self.identity if run.identity.get(k) != self.identity[k])
            raise FlextronError(
                f"{self.path} holds an unfinished run that differs in {', '.join(changed)}; "
                "finish it with its own settings, or remove that directory to start again"
            )
        try:
            weights = load_file(self._state / "model.safetensors")
            moments = load_file(self._state / "optimizer.safetensors")
        except (SafetensorError, OSError) as error:
            raise FlextronError(f"{self._state} is damaged ({error}); remove it to start again") from error
        self._check(model, weights, moments)
        self._restore(model, optimizer, weights, moments, run.step)
        return run.step, run.history

    def _read(self) -> _RunFile:
        path = self._state / "run.json"
        return checked(_RunFile, read_json(path), str(path), f"remove {self._state} to start again")

    def _check(self, model: nn.Module, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """See that the state holds what the model trains, and nothing of other shapes."""
        for name, p in model.named_parameters():
            stored = [weights.get(name), *(moments.get(f"{name}:{key}") for key in _MOMENTS)]
            whole = len({t is None for t in stored[1:]}) == 1 and (stored[0] is not None or not p.requires_grad)
            if not whole or any(t is not None and t.shape != p.shape for t in stored):
                raise FlextronError(f"{self._state} lacks {name} or has it in another shape; remove it to start again")

    @staticmethod
    @torch.no_grad()
    def _restore(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        step: int,
    ) -> None:
        for name, p in model.named_parameters():
            if name in weights:
                p.copy_(weights[name])
            if f"{name}:exp_avg" in moments:
                optimizer.state[p] = {key: moments[f"{name}:{key}"].to(p.device) for key in _MOMENTS} | {
                    "step": torch.tensor(float(step), device=p.device if p.is_cuda else "cpu")
                }

    def forget_finished(self) -> None:
        """Remove the state of a run that ended and was killed before it could: the model has moved on since."""
        if self._state.exists() and self._read().identity.get("start") != self.identity.get("start"):
            shutil.rmtree(self._state)

    def sensitivity(self, measure: Callable[[], Sensitivity]) -> Sensitivity:
        """What guides the run's sub-networks: measured when it starts, and the same when it goes on."""
        path = self.path / "sensitivity.json"
        if self._state.exists() and path.exists():
            return Sensitivity.from_dict(read_json(path))
        measured = measure()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(path, measured.to_dict())
        return measured

"""Training state on disk, from which a killed run goes on as if nothing had happened: safetensors and JSON, no pickle.

Data order, sub-networks and token choice depend on the step alone, so parameters, AdamW's moments and the step are all
there is to save. `torch.distributed.checkpoint` writes them: each process its shards, into safetensors files that any
number of processes reads. A state of one process in the older form, whole tensors in two files, reads the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.files import checked, new_directory, read_json, write_json
from flextron.parallel.processes import Processes, is_loss
from flextron.routing.sensitivity import Sensitivity

if TYPE_CHECKING:
    from flextron.parallel.shard_files import ShardFiles

__all__ = ["RunDirectory"]

_Count = Annotated[int, Field(ge=0, le=2**53)]


class _RunFile(BaseModel):
    """`run.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    step: _Count
    identity: dict[str, Any]
    history: list[dict[str, float]]
    updates: dict[str, _Count] = {}
    """Steps of the optimizer that a parameter got, where they are fewer: no sub-network of a step had it."""


_MOMENTS = ("exp_avg", "exp_avg_sq")
_DAMAGES = (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError, AssertionError)
"""What reading a damaged state raises."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory in which a training run keeps its state; a run of another recipe or text does not go on from it.

    All processes of the run see the same directory.
    """

    path: Path
    identity: dict[str, Any]
    """What must be equal for a resumed run to be the same run: recipe, text, model, and what the model had learnt."""
    processes: Processes = field(default_factory=Processes.join)

    @property
    def _state(self) -> Path:
        return self.path / "state"

    def save(
        self,
        step: int,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        history: list[dict[str, float]],
    ) -> None:
        """Replace the saved state by one after `step` steps, in one move; on all processes.

        Args:
            step: steps done.
            trained: parameters by name, in whole or in shards.
            optimizer: with their moments.
            history: losses of all steps.
        """
        tensors = {name: p.detach() for name, p in trained.items()}
        updates = {}
        for name, p in trained.items():
            if p in optimizer.state:
                tensors |= {f"{name}:{key}": optimizer.state[p][key] for key in _MOMENTS}
                updates[name] = int(optimizer.state[p]["step"])
        run = {
            "step": step,
            "identity": self.identity,
            "history": history,
            "updates": {name: count for name, count in updates.items() if count != step},
        }
        with self._new_state() as temporary:
            self._files(temporary).write(tensors)
            self.processes.from_first(lambda: write_json(temporary / "run.json", run))

    def _files(self, directory: Path) -> ShardFiles:
        from flextron.parallel.shard_files import ShardFiles  # a second of imports, for those alone who keep states

        return ShardFiles(directory, alone=not self.processes.are_several)

    @contextmanager
    def _new_state(self) -> Iterator[Path]:
        """A temporary directory of all processes that takes the state's place."""
        with ExitStack() as stack:
            made = self.processes.from_first(
                lambda: str(stack.enter_context(new_directory(self._state, overwrite=True)))
            )
            yield Path(made)

    def load(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[dict[str, float]]] | None:
        """Restore the saved state, if there is one; on all processes, however many wrote it.

        Returns:
            Steps done and the history of their losses; None without a state.

        Raises:
            FlextronError: the state is of another run, or damaged.
        """
        if not self.processes.from_first(self._state.exists):
            return None
        run = self._read()
        if run.identity != self.identity:
            changed = sorted(k for k in self.identity if run.identity.get(k) != self.identity[k])
            raise FlextronError(
                f"{self.path} holds an unfinished run that differs in {', '.join(changed)}; "
                "finish it with its own settings, or remove that directory to start again"
            )
        try:
            files = self._files(self._state)
            wanted = self._wanted(trained, files.shapes())
            files.read(wanted)
        except FlextronError:
            raise
        except _DAMAGES as error:
            if self.processes.are_several and is_loss(error):
                raise
            said = " ".join(str(error).split())[:200]
            raise FlextronError(f"{self._state} is damaged ({said}); remove it to start again") from error
        for name, p in trained.items():
            if f"{name}:{_MOMENTS[0]}" in wanted:
                count = torch.tensor(float(run.updates.get(name, run.step)), device=p.device if p.is_cuda else "cpu")
                optimizer.state[p] = {key: wanted[f"{name}:{key}"] for key in _MOMENTS} | {"step": count}
        return run.step, run.history

    def _read(self) -> _RunFile:
        path = self._state / "run.json"
        return checked(_RunFile, read_json(path), str(path), f"remove {self._state} to start again")

    def _wanted(self, trained: Mapping[str, nn.Parameter], stored: Mapping[str, Any]) -> dict[str, Tensor]:
        """Where to read to: the parameters themselves, and room for the moments of those that have some.

        Raises:
            FlextronError: a tensor is missing, in part or altogether, or has another shape.
        """
        wanted: dict[str, Tensor] = {}
        for name, p in trained.items():
            moments = [f"{name}:{key}" for key in _MOMENTS if f"{name}:{key}" in stored]
            for key in (name, *moments):
                if len(moments) == 1 or stored.get(key) != (p.shape, p.dtype):
                    raise FlextronError(
                        f"{self._state} lacks {name} or has it in another shape; remove it to start again"
                    )
            wanted |= {name: p.detach()} | {key: torch.zeros_like(p.detach()) for key in moments}
        return wanted

    def forget_finished(self) -> None:
        """Remove the state of a run that ended and was killed before it could: the model has moved on since."""

        def forget() -> None:
            if self._state.exists() and self._read().identity.get("start") != self.identity.get("start"):
                shutil.rmtree(self._state)

        self.processes.from_first(forget)

    def sensitivity(self, measure: Callable[[], Sensitivity]) -> Sensitivity:
        """What guides the run's sub-networks: measured when it starts, and the same when it goes on."""
        path = self.path / "sensitivity.json"
        if self._state.exists() and path.exists():
            return Sensitivity.from_dict(read_json(path))
        measured = measure()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(path, measured.to_dict())
        return measured

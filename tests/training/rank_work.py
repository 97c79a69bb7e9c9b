"""What the processes of `test_many_processes.py` do; imported by each, so it imports little."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextron.elastic.adapter import sharing
from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.routing import LatencyTable
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.dealing import RouterSampler
from flextron.training.recipe import TrainRecipe
from flextron.training.router_recipe import RouterRecipe
from flextron.training.routers import RouterResult, train_static_router
from flextron.training.run import TrainingRun
from flextron.training.state import RunDirectory
from flextron.training.trainer import train


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that a run starts from."""

    decoder: Decoder
    teacher: Decoder
    space: SearchSpace
    blocks: TokenBlocks
    recipe: TrainRecipe
    adapter: Adapter | None = None
    """Trains beside the teacher's weights."""
    routing: RouterSampler | None = None
    specs: tuple[SubnetSpec, ...] = field(default=())

    def weights(self) -> dict[str, Tensor]:
        """All that a run starts from."""
        own = self.modules()
        return weights(own if self.routing is None else {**own, "router": self.routing.router})

    def modules(self) -> dict[str, Any]:
        """Modules of a run's own."""
        teacher = copy.deepcopy(self.teacher)
        student = copy.deepcopy(self.decoder) if self.adapter is None else sharing(teacher)
        return {"decoder": student, "teacher": teacher, "adapter": copy.deepcopy(self.adapter)}


def outcome(_: torch.device | None, case: Case) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of a run, and all that its modules hold afterwards."""
    own, routing = case.modules(), copy.deepcopy(case.routing)
    result = train(space=case.space, blocks=case.blocks, recipe=case.recipe, specs=case.specs, routing=routing, **own)
    if routing is not None:
        own["router"] = routing.router
    return result.history, weights(own)


def weights(modules: dict[str, nn.Module | None]) -> dict[str, Tensor]:
    """Copies of all parameters by module and name."""
    return {
        f"{part}.{name}": p.detach().clone()
        for part, module in modules.items()
        if module is not None
        for name, p in module.named_parameters()
    }


def prepared(case: Case, directory: Path | None) -> tuple[TrainingRun, RunDirectory | None]:
    """A run before its first step."""
    kept = None if directory is None else RunDirectory(directory, {"a": 1})
    run = TrainingRun(
        space=case.space, blocks=case.blocks, recipe=case.recipe, directory=kept, specs=case.specs, **case.modules()
    )
    return run, kept


def first_steps(_: torch.device | None, case: Case, directory: Path, until: int) -> list[dict[str, float]]:
    """Losses of the first steps, after which the state is saved."""
    run, kept = prepared(case, directory)
    assert kept is not None
    history = [run.step(step) for step in range(until)]
    kept.save(until, run.trained, run.optimizer, history)
    return history


def next_steps(_: torch.device | None, case: Case, directory: Path, count: int) -> list[dict[str, float]]:
    """Losses of the steps after those of a saved state."""
    run, kept = prepared(case, directory)
    assert kept is not None
    restored = kept.load(run.trained, run.optimizer)
    assert restored is not None
    return [run.step(step) for step in range(restored[0], restored[0] + count)]


def bytes_held(_: torch.device | None, case: Case) -> int:
    """Bytes of parameters and moments of this process after a step; storages are counted once."""
    run, _directory = prepared(case, None)
    run.step(0)
    tensors = [*run.module.parameters()]
    tensors += [t for state in run.optimizer.state.values() for t in state.values()]
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def refusal(_: torch.device | None, case: Case, directory: Path) -> str:
    """The sentence with which a run, or its saved state, is refused."""
    try:
        next_steps(None, case, directory, 1)
    except FlextronError as error:
        return str(error)
    return ""


def routed(
    _: torch.device | None,
    decoder: Decoder,
    space: SearchSpace,
    table: LatencyTable,
    blocks: TokenBlocks,
    directory: Path,
) -> tuple[RouterResult, dict[str, Tensor]]:
    """What training the static router gives, and the weights of the model afterwards."""
    own = copy.deepcopy(decoder)
    recipe = RouterRecipe(num_measured=10, per_round=5, warm_steps=20, surrogate_steps=5, router_steps=3)
    tokens_BT = blocks.batch(0, 3)
    result = train_static_router(own, space, table, tokens_BT, recipe, run_directory=directory)
    return result, weights({"decoder": own})

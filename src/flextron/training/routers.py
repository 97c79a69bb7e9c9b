"""Training the static router of a frozen model, by surrogate and latency table (Flextron, 3.3).

The router proposes sub-networks, the frozen model measures their loss on fixed calibration sequences, and
the surrogate learns to predict it. Whenever it predicted the newest measurements well, the router steps downhill on
the surrogate's output and the table's latency, which costs no pass through the model. Proposals are drawn with Gumbel
noise; the steps are taken on the probabilities themselves, whose sharpness rises. Then the surrogate is dropped.
Several processes measure as many sub-networks at once, with the model in shards.

The second stage is `training/router_joint.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.model.decoder import Decoder
from flextron.parallel.processes import Processes
from flextron.progress import OnStep
from flextron.routing.allocate import Allocator
from flextron.routing.latency import LatencyTable
from flextron.routing.routers import Choices, StaticRouter, latency_ms
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.routing.surrogate import Surrogate, spearman
from flextron.spec import SearchSpace, SubnetSpec
from flextron.training.loss_meter import LossMeter
from flextron.training.router_joint import latency_loss
from flextron.training.router_recipe import RouterRecipe
from flextron.training.sampling import random_subnet

__all__ = ["RouterRecipe", "RouterResult", "train_static_router"]

_HELD_OUT = 32
"""Random sub-networks on which the surrogate is judged at the end."""
_SENSITIVITY_SEQUENCES = 2


@dataclass(frozen=True, kw_only=True)
class RouterResult:
    """A trained router, and how good its surrogate was."""

    router: StaticRouter
    spearman: float
    """Rank correlation of the surrogate's prediction and the loss, on random sub-networks that it never saw."""
    error: float
    """Its mean error on them, in the logarithm of the rise."""
    num_measured: int
    router_rounds: int
    """Rounds in which the surrogate was good enough for the router to step."""
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _Stage:
    """The first stage's state."""

    router: StaticRouter
    surrogate: Surrogate
    table: LatencyTable
    recipe: RouterRecipe
    generator: torch.Generator
    rng: random.Random
    lowest: float

    def __post_init__(self) -> None:
        self.full_ms = self.table.predict_ms(self.router.space.full)
        self.router_optimizer = torch.optim.Adam(self.router.parameters(), lr=self.recipe.lr)
        self.surrogate_optimizer = torch.optim.AdamW(
            self.surrogate.parameters(), lr=self.recipe.surrogate_lr, weight_decay=0.01
        )

    def targets(self, count: int) -> Tensor:
        """Stratified over the range, in no order."""
        strata = (torch.arange(count) + torch.rand(count, generator=self.generator)) / count
        return self.lowest + (1 - self.lowest) * strata

    def warm_start(self, sensitivity: Sensitivity) -> None:
        """Imitate the additive loss model's optimum."""
        space = self.router.space
        allocator = Allocator(space, sensitivity, self.table.layer_ms)
        targets = torch.linspace(self.lowest, 1, 32)
        specs = [allocator.within(float(t) * self.full_ms - self.table.base_ms) for t in targets]
        wanted = self.router.one_hot(specs)
        optimizer = torch.optim.Adam(self.router.parameters(), lr=self.recipe.warm_lr)
        for _ in range(self.recipe.warm_steps):
            logits = self.router(targets)
            loss = sum(
                F.cross_entropy(ours.flatten(0, 1), one_hot.argmax(-1).flatten(), label_smoothing=0.1)
                for ours, one_hot in (
                    (logits.mlp_BLW, wanted.mlp_BLW),
                    (logits.attention_BLG, wanted.attention_BLG),
                )
            )
            # without smoothing: of layers that may not be skipped, the other choice has no probability to give
            loss = loss + F.cross_entropy(logits.keep_BL2.flatten(0, 1), wanted.keep_BL2.argmax(-1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def propose(self, progress: float) -> list[SubnetSpec]:
        """Sub-networks drawn with the router's noise."""
        count = self.recipe.per_round
        logits = self.router(self.targets(count))
        specs = self.router.sample(_relax(self.recipe, logits, progress, self.generator))
        num_random = round(self.recipe.random_fraction * count)
        return specs[: count - num_random] + [
            random_subnet(self.router.space, self.rng.random(), self.rng) for _ in range(num_random)
        ]

    def fit(self, seen: list[SubnetSpec], rises: Tensor) -> None:
        """Steps of the surrogate on all that was measured."""
        choices, wanted = self.router.one_hot(seen), Surrogate.target(rises).float()
        for _ in range(self.recipe.surrogate_steps):
            loss = F.smooth_l1_loss(self.surrogate(choices), wanted)
            self.surrogate_optimizer.zero_grad()
            loss.backward()
            self.surrogate_optimizer.step()

    def route(self, progress: float) -> dict[str, float]:
        """Steps of the router; the last one's losses."""
        figures = {}
        for _ in range(self.recipe.router_steps):
            targets = self.targets(self.recipe.num_targets)
            low, high = self.recipe.scale
            choices = self.router(targets).relaxed(1.0, low + (high - low) * progress, None)
            predicted = self.surrogate(choices).mean()
            latency = latency_loss(latency_ms(choices, self.table), targets * self.full_ms, self.recipe.dead_zone)
            self.router_optimizer.zero_grad()
            (predicted + self.recipe.latency_weight * latency).backward()
            self.router_optimizer.step()
            figures = {"predicted": float(predicted.detach()), "latency": float(latency.detach())}
        return figures


def train_static_router(
    decoder: Decoder,
    space: SearchSpace,
    table: LatencyTable,
    calibration_BT: Tensor,
    recipe: RouterRecipe | None = None,
    *,
    run_directory: Path | None = None,
    on_round: OnStep | None = None,
) -> RouterResult:
    """Train a router for a frozen model; the first stage.

    Args:
        decoder: the full model, not changed.
        space: its sub-networks.
        table: costs on this device, or parameters (`LatencyTable.of_parameters`) for a router of no device.
        calibration_BT: sequences on which losses are measured; the first ones also give the sensitivities.
        recipe: settings.
        run_directory: where measured losses are kept; without one, a killed run is lost.
        on_round: called after every round with rounds done, rounds in all, and figures.
    """
    recipe, processes = recipe or RouterRecipe(), Processes.join()
    sensitivity = processes.shared(
        lambda: measure_sensitivity(decoder, calibration_BT[:_SENSITIVITY_SEQUENCES], space, seed=recipe.seed),
        Sensitivity.to_dict,
        Sensitivity.from_dict,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        router, surrogate = StaticRouter(space), Surrogate(space, sensitivity)
    generator = torch.Generator().manual_seed(recipe.seed)
    lowest = max(recipe.min_target, table.predict(space.smallest))
    stage = _Stage(router, surrogate, table, recipe, generator, random.Random(recipe.seed), lowest)
    if recipe.warm_steps:
        stage.warm_start(sensitivity)
    path = None if run_directory is None else run_directory / "losses.json"
    meter = LossMeter(decoder, calibration_BT, path, processes)
    if not processes.are_several:
        return _train(stage, meter, processes, on_round)
    from flextron.parallel.sharding import in_shards  # a second of imports, which one process need not wait for

    with in_shards(decoder, processes) as shards:
        meter.decoder = shards
        return _train(stage, meter, processes, on_round)


def _train(stage: _Stage, meter: LossMeter, processes: Processes, on_round: OnStep | None) -> RouterResult:
    """The rounds, and what they led to."""
    recipe, router, surrogate, space = stage.recipe, stage.router, stage.surrogate, stage.router.space
    full = float(meter([space.full])[0])
    rounds = -(-recipe.num_measured // recipe.per_round)
    seen: list[SubnetSpec] = []
    rises = torch.zeros(0, dtype=torch.float64)
    history: list[dict[str, float]] = []
    router_rounds = 0
    for r in range(rounds):
        progress = r / max(1, rounds - 1)
        new = _agreed(stage.propose(progress), processes)
        measured = meter(new) - full
        with torch.no_grad():
            error = (surrogate(router.one_hot(new)) - Surrogate.target(measured)).abs().mean()
        seen, rises = seen + new, torch.cat((rises, measured))
        stage.fit(seen, rises)
        figures = {"error": float(error)}
        if float(error) < recipe.max_error:
            figures |= stage.route(progress)
            router_rounds += 1
        history.append(figures)
        if on_round is not None and processes.is_first:
            on_round(r + 1, rounds, figures)
    rng = random.Random(f"held out/{recipe.seed}")
    held_out = [space.heterogeneous(j / (_HELD_OUT - 1), rng) for j in range(_HELD_OUT)]
    actual = meter(held_out) - full
    with torch.no_grad():
        predicted = surrogate(router.one_hot(held_out)).double()
    return RouterResult(
        router=router.eval().requires_grad_(False),
        spearman=spearman(predicted, actual),
        error=float((predicted - Surrogate.target(actual)).abs().mean()),
        num_measured=len(set(seen)),
        router_rounds=router_rounds,
        history=history,
    )


def _agreed(specs: list[SubnetSpec], processes: Processes) -> list[SubnetSpec]:
    """What the first process proposes: routers that train apart could part by rounding."""
    return processes.shared(
        lambda: specs,
        lambda proposed: [s.to_dict() for s in proposed],
        lambda data: [SubnetSpec.from_dict(s) for s in data],
    )


def _relax(recipe: RouterRecipe, logits: Choices, progress: float, generator: torch.Generator) -> Choices:
    """Noisy probabilities at a point of the schedule."""
    (first, last), (low, high) = recipe.tau, recipe.scale
    tau = first * (last / first) ** progress
    return logits.relaxed(tau, low + (high - low) * progress, logits.gumbel(generator))

"""Both stages of router training on a toy model, against what the table and the model themselves say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.routing.routers import StaticRouter
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.router_joint import JointRouting, latency_loss
from flextron.training.router_recipe import RouterRecipe
from flextron.training.routers import RouterResult, train_static_router
from flextron.training.trainer import train
from tests.checkpoints.families_cases import VOCAB, random_tokens
from tests.toy import CONTEXT, SPACE, TABLE, toy_blocks, toy_decoder, toy_recipe, weights_of


def progressions(count: int, seed: int) -> Tensor:
    """Rows that count upwards by steps of their own: a text that a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (
        torch.randint(0, VOCAB, (count, 1), generator=generator),
        torch.randint(1, 6, (count, 1), generator=generator),
    )
    return (start + step * torch.arange(CONTEXT)) % VOCAB


def learned_decoder() -> Decoder:
    """A toy that has learnt progressions, so that what is cut from it costs something."""
    decoder = toy_decoder()
    recipe = toy_recipe(
        steps=250,
        batch_size=16,
        kl_weight=0.0,
        hidden_weight=0.0,
        lm_weight=1.0,
        kl_fraction=1.0,
        full_probability=1.0,
        train_embeddings=True,
        lr=5e-3,
    )
    train(decoder, None, SPACE, TokenBlocks(tokens=progressions(512, seed=1).numpy().astype("int32"), seed=0), recipe)
    return decoder


DECODER = learned_decoder()
CALIBRATION = progressions(8, seed=99)
RECIPE = RouterRecipe(num_measured=128)
LEAST = TABLE.predict(SPACE.smallest)


@pytest.fixture(scope="module")
def trained() -> RouterResult:
    return train_static_router(DECODER, SPACE, TABLE, CALIBRATION, RECIPE)


def test_the_surrogate_ranks_unseen_sub_networks(trained: RouterResult) -> None:
    assert trained.spearman > 0.85
    assert trained.router_rounds > 0
    assert trained.num_measured > 10


def test_answers_come_close_to_the_target_from_below(trained: RouterResult) -> None:
    for j in range(20):
        target = LEAST + (1 - LEAST) * j / 19
        achieved = TABLE.predict(trained.router.spec(target, TABLE))
        # the coarsest step of this space is one layer's 32 neurons
        assert target - 0.64 / TABLE.full_ms - 0.05 <= achieved <= target * (1 + 1e-9)


def test_answers_are_near_the_best_that_the_budget_buys(trained: RouterResult) -> None:
    layers = [*product(SPACE.intermediate_sizes, SPACE.num_groups), (0, 0)]
    every = [SubnetSpec.of(*zip(*c, strict=True)) for c in product(layers, repeat=3)]
    specs = [s for s in every if s in SPACE]
    losses = {spec: mean_loss(DECODER, CALIBRATION, spec) for spec in specs}
    ranks, regret, usual_regret = [], 0.0, 0.0
    for j in range(12):
        target = LEAST + (1 - LEAST) * (j + 0.5) / 12
        within = sorted(losses[s] for s in specs if TABLE.predict(s) <= target)
        chosen = losses[trained.router.spec(target, TABLE)]
        ranks.append(sum(loss < chosen for loss in within) / len(within))
        regret += chosen - within[0]
        usual_regret += within[len(within) // 2] - within[0]
    # rounding in another order trains another router, so no single answer is certain
    assert sum(ranks) / len(ranks) < 0.15, ranks
    assert regret < 0.3 * usual_regret


def test_a_killed_run_goes_on_without_measuring_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPE.model_copy(update={"num_measured": 32})
    whole = train_static_router(DECODER, SPACE, TABLE, CALIBRATION, recipe)

    def stop_at_two(done: int, total: int, figures: dict[str, float]) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_static_router(DECODER, SPACE, TABLE, CALIBRATION, recipe, run_directory=tmp_path, on_round=stop_at_two)
    measured: list[Any] = []

    def counted(*args: object) -> float:
        measured.append(args)
        return mean_loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("flextron.training.loss_meter.mean_loss", counted)
    resumed = train_static_router(DECODER, SPACE, TABLE, CALIBRATION, recipe, run_directory=tmp_path)
    again = len(measured)
    train_static_router(DECODER, SPACE, TABLE, CALIBRATION, recipe)
    assert 0 < again < len(measured) - again
    assert resumed.history == whole.history
    for name, tensor in whole.router.state_dict().items():
        assert torch.equal(tensor, resumed.router.state_dict()[name])
    # what was measured on another text, or before the model changed, does not count
    measured.clear()
    train_static_router(DECODER, SPACE, TABLE, CALIBRATION[:4], recipe, run_directory=tmp_path)
    assert len(measured) == len({str(args[2]) for args in measured}) > again
    assert all(len(args[1]) == 4 for args in measured)


def test_the_latency_loss_by_hand() -> None:
    loss = latency_loss(torch.tensor([10.0, 12.0, 9.95]), torch.tensor([10.0, 10.0, 10.0]), 0.01)
    assert float(loss) == pytest.approx((0 + 0.19 + 0) / 3, abs=1e-6)


def fresh_router() -> StaticRouter:
    torch.manual_seed(0)
    return StaticRouter(SPACE)


def routing(router: StaticRouter, **changes: float) -> JointRouting:
    return JointRouting(router=router, table=TABLE, recipe=RECIPE, full_probability=changes.get("full", 0.0))


@pytest.fixture
def float64() -> Iterator[None]:
    """Whatever is made meanwhile has twice the digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
def test_gates_leave_the_output_as_it_is_and_carry_gradients() -> None:
    router, decoder = fresh_router(), copy.deepcopy(DECODER).double()
    tokens = random_tokens(2, 10, seed=5)
    total = torch.zeros(())
    for step in range(8):
        drawn = routing(router).draw(step, 0, 2)
        with_gates = decoder(Batch.dealt(tokens, drawn.specs, drawn.gates))
        torch.testing.assert_close(with_gates, decoder(Batch.dealt(tokens, drawn.specs)), rtol=1e-12, atol=1e-12)
        total = total + with_gates.square().mean()
    gradients = torch.autograd.grad(total, list(router.parameters()), allow_unused=True)
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def test_drawn_sub_networks_cost_their_targets_at_most() -> None:
    for step in range(6):
        targets = (0.7, 0.9)
        drawn = replace(routing(fresh_router()), targets=targets).draw(step, 0, 4)
        costs = sorted(TABLE.predict(spec) for spec in drawn.specs)
        assert all(a <= b * (1 + 1e-9) for a, b in zip(costs, (0.7, 0.7, 0.9, 0.9), strict=True))


def test_a_gate_has_the_gradient_of_the_chosen_branchs_share() -> None:
    """Scaling what a half layer adds by its probability, as a mixture of experts would, gives the same derivative."""
    router = fresh_router()
    drawn = routing(router).draw(0, 0, 1)
    (gates,) = drawn.gates
    assert gates is not None
    tokens = random_tokens(1, 10, seed=5)

    def run(factors: Tensor) -> Tensor:
        return DECODER(Batch.dealt(tokens, drawn.specs, [factors])).square().mean()

    free = gates.detach().clone().requires_grad_()
    (by_gate,) = torch.autograd.grad(run(free), free)
    shift = torch.zeros_like(free)
    shift[0, 1] = 1e-2
    with torch.no_grad():
        slope = float(run(free + shift) - run(free - shift)) / 2e-2
    assert float(by_gate[0, 1]) == pytest.approx(slope, rel=0.02)


def test_joint_finetuning_trains_model_and_router_and_resumes(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=6, checkpoint_minutes=1e-9)

    def run(directory: Path | None, stop: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        decoder, router = toy_decoder(), fresh_router()

        def step(done: int, total: int, losses: dict[str, float]) -> None:
            assert losses["latency"] >= 0
            if done == stop:
                raise KeyboardInterrupt

        train(
            decoder,
            toy_decoder(),
            SPACE,
            toy_blocks(),
            recipe,
            routing=routing(router, full=0.2),
            run_directory=directory,
            on_step=step,
        )
        return weights_of(decoder), {n: t.detach().clone() for n, t in router.state_dict().items()}

    model, router = run(None)
    untrained = weights_of(toy_decoder())
    assert any(not torch.equal(model[n], untrained[n]) for n in model)
    assert all(not torch.equal(router[n], t) for n, t in fresh_router().state_dict().items())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=4)
    model_again, router_again = run(tmp_path)
    for ours, reference in ((model_again, model), (router_again, router)):
        for name, tensor in reference.items():
            assert torch.allclose(ours[name], tensor, atol=1e-5), name


def test_the_full_network_is_drawn_without_gates() -> None:
    drawn = routing(fresh_router(), full=1.0).draw(0, 0, 3)
    assert drawn.specs == [SPACE.full] * 3
    assert drawn.gates == [None] * 3

"""The token router's labels, gradients and training, against measurements and derivations made another way."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from flextron.errors import FlextronError
from flextron.losses.vocabulary import forward_kl
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.routing.sensitivity import measure_sensitivity
from flextron.routing.token_router import TokenRouter
from flextron.spec import SubnetSpec
from flextron.training.token_costs import token_costs
from flextron.training.token_joint import JointStage, SampledRouter
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.training.token_routing import TokenRouterResult, routed_kl, train_token_router
from tests.checkpoints.families_cases import random_tokens
from tests.token_toy import HIDDEN, STATIC, opinionated_router
from tests.toy import SPACE, TABLE, same_weights, synthetic_ms, toy_blocks, toy_decoder, weights_of


def recipe(**changes: Any) -> TokenRouterRecipe:
    values: dict[str, Any] = {
        "batch_size": 16,
        "warm_tokens": 768,
        "warm_epochs": 3,
        "heldout_blocks": 32,
        "joint_steps": 6,
    }
    return TokenRouterRecipe(**values | changes)


def new_router(seed: int = 0) -> TokenRouter:
    torch.manual_seed(seed)
    return TokenRouter.for_table(SPACE, HIDDEN, TABLE, num_units=32)


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox"])
def test_mean_token_costs_are_the_sensitivities(case: str) -> None:
    decoder, tokens = toy_decoder(case=case), random_tokens(4, 12)
    reference = measure_sensitivity(decoder, tokens, SPACE, seed=5)
    generator = torch.Generator().manual_seed(5)
    found = token_costs(decoder, tokens, SPACE.full, SPACE, num_draws=1, generator=generator)
    for i, by_width in enumerate(reference.mlp):
        expected = [by_width[w] for w in (0, 8, 24)]
        assert found[i].costs_NC.mean(0).tolist() == pytest.approx(expected, rel=1e-4)
        assert (found[i].costs_NC >= 0).all()


def test_more_draws_average_the_same_costs() -> None:
    decoder, tokens = toy_decoder(), random_tokens(4, 12)
    generator = torch.Generator().manual_seed(5)
    single = [
        token_costs(decoder, tokens, STATIC[0.8], SPACE, num_draws=1, generator=generator)[2].costs_NC for _ in range(3)
    ]
    generator = torch.Generator().manual_seed(5)
    together = token_costs(decoder, tokens, STATIC[0.8], SPACE, num_draws=3, generator=generator)[2].costs_NC
    torch.testing.assert_close(together, torch.stack(single).mean(0))


def test_costs_are_measured_only_where_the_static_subnetwork_has_an_mlp() -> None:
    spec = SubnetSpec.of([8, 0, 24], [1, 0, 2])
    generator = torch.Generator().manual_seed(5)
    found = token_costs(toy_decoder(), random_tokens(2, 8), spec, SPACE, num_draws=1, generator=generator)
    assert found.keys() == {0, 2}


class Replay:
    """Given widths, and gates whose gradients can be read."""

    def __init__(self, widths: dict[int, Tensor]) -> None:
        self.widths = widths
        self.gates = {i: torch.ones(len(w), requires_grad=True) for i, w in widths.items()}

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.widths[layer], self.gates[layer]

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        pass


class Watching(SampledRouter):
    """Keeps what it read and chose."""

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        widths, gates = super().__call__(layer, x_ND)
        self.__dict__.setdefault("read", {})[layer] = x_ND.detach()
        self.__dict__.setdefault("chosen", {})[layer] = widths
        assert torch.equal(gates.detach(), torch.ones(len(gates)))
        return widths, gates


def test_gradients_reach_the_router_through_the_probability_of_what_ran() -> None:
    """Against the chain rule by hand: loss by gate, gate by probability, probability by priced logits."""
    decoder, router, tokens = toy_decoder(), opinionated_router(), random_tokens(3, 9)
    target, price, tau, scale = 0.8, 20.0, 0.7, 2.0
    sampled = Watching(router, target, price, tau=tau, logit_scale=scale, seed="a")
    direction = torch.randn(27, HIDDEN, generator=torch.Generator().manual_seed(1))
    parameters = dict(router.named_parameters())
    run = decoder(Batch.padded(tokens, STATIC[target], sampled))
    ours = torch.autograd.grad((run * direction).sum(), list(parameters.values()))

    replay = Replay(sampled.__dict__["chosen"])
    again = decoder(Batch.padded(tokens, STATIC[target], replay))
    torch.testing.assert_close(again, run)
    gate_gradients = torch.autograd.grad((again * direction).sum(), list(replay.gates.values()))
    surrogate = torch.zeros(())
    for (layer, widths), gradient in zip(replay.widths.items(), gate_gradients, strict=True):
        scores = scale * (router.logits(layer, sampled.__dict__["read"][layer], target) - price * router.costs_C) / tau
        # the noise, up to a constant of each token, from the choice: it is found again by its seed
        noise = gumbel(f"a/{layer}", scores.shape)
        p = torch.softmax(scores + noise / tau, -1)
        index = torch.searchsorted(torch.tensor([0, 8, 24, 40]), widths)
        assert torch.equal(p.argmax(-1), index)
        surrogate = surrogate + (gradient * p[torch.arange(len(index)), index]).sum()
    theirs = torch.autograd.grad(surrogate, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert any(g.abs().max() > 1e-3 for g in theirs)


def gumbel(seed: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return -torch.log(-torch.log(torch.rand(shape, generator=generator)))


def test_samples_follow_the_softmax_of_the_scaled_scores() -> None:
    router, x = opinionated_router(), torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(2))
    sampled = SampledRouter(router, 0.8, 10.0, tau=0.3, logit_scale=1.5, seed="b")
    widths, _ = sampled(1, x.expand(20_000, -1))
    scores = 1.5 * (router.logits(1, x, 0.8) - 10.0 * router.costs_C)
    shares = torch.stack([(widths == w).float().mean() for w in (0, 8, 24, 40)])
    torch.testing.assert_close(shares, torch.softmax(scores, -1)[0].detach(), rtol=0, atol=0.02)
    assert shares.max() < 0.9


def test_recomputing_layers_in_the_backward_pass_finds_the_same_samples() -> None:
    decoder, router, tokens = toy_decoder(), opinionated_router(), random_tokens(3, 9)
    gradients = []
    for decoder.gradient_checkpointing in (False, True):
        sampled = SampledRouter(router, 0.8, 20.0, tau=0.7, logit_scale=2.0, seed="a")
        loss = decoder(Batch.padded(tokens, STATIC[0.8], sampled)).square().mean()
        loss = loss + torch.stack(list(sampled.spent.values())).sum()
        gradients.append(torch.autograd.grad(loss, list(router.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def joint(router: TokenRouter, **changes: Any) -> JointStage:
    decoder = toy_decoder()
    return JointStage(
        decoder=decoder,
        teacher=decoder,
        router=router,
        table=TABLE,
        static_specs=STATIC,
        recipe=recipe(**changes),
    )


def test_joint_losses_are_those_of_the_segments_one_by_one() -> None:
    router, tokens = opinionated_router(), random_tokens(5, 9)
    router.prices = dict.fromkeys(STATIC, 20.0)
    stage = joint(router, targets_per_batch=2)
    losses = stage.losses(tokens, step=3)
    routers = stage.routers(3, 2)
    assert len(routers) == 2
    student, over = [], []
    for part, (target, sampled) in zip(tokens.split([3, 2]), routers.items(), strict=True):
        watching = Watching(router, target, 20.0, tau=sampled.tau, logit_scale=sampled.logit_scale, seed=sampled.seed)
        student.append(stage.decoder(Batch.padded(part, STATIC[target], watching)))
        chosen = watching.__dict__["chosen"]
        ms = TABLE.predict_ms(SubnetSpec.of([8] * 3, STATIC[target].num_groups)) - 3 * TABLE.mlp_ms[8]
        ms += sum(0.02 * float(w.float().mean()) for w in chosen.values())
        over.append(ms / TABLE.predict_ms(STATIC[target]))
    teacher = stage.decoder(Batch.padded(tokens, SPACE.full))
    head = stage.decoder.head_weight
    kl = forward_kl(torch.cat(student), head, teacher, head)
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=0)
    assert float(losses["cost_ratio"].detach()) == pytest.approx(sum(over) / 2, rel=1e-5)
    expected = sum(max(0.0, abs(r - 1) - 0.01) for r in over) / 2
    assert float(losses["latency"].detach()) == pytest.approx(expected, rel=1e-3)


def test_the_latency_loss_pulls_the_average_cost_to_the_target() -> None:
    router = opinionated_router()
    router.prices = dict.fromkeys(STATIC, 0.0)
    history: list[dict[str, float]] = []
    stage = joint(router, joint_steps=40, latency_weight=30.0, router_lr=3e-2)
    stage.run(toy_blocks(32), history.append)
    ratios = [h["cost_ratio"] for h in history]
    assert ratios[0] > 1.05
    assert sum(ratios[-8:]) / 8 == pytest.approx(1, abs=0.03)


def run(router: TokenRouter, **changes: Any) -> TokenRouterResult:
    decoder = toy_decoder()
    return train_token_router(decoder, decoder, router, TABLE, STATIC, toy_blocks(96), recipe(**changes))


def best_static_kl(spec: SubnetSpec, tokens: Tensor) -> float:
    """The lowest KL of all sub-networks with the spec's attention and at most its time, by trying them."""
    decoder = toy_decoder()
    candidates = [SubnetSpec.of(w, spec.num_groups) for w in product((8, 24, 40), (0, 8, 24, 40), (8, 24, 40))]
    affordable = [c for c in candidates if synthetic_ms(c) <= synthetic_ms(spec) + 1e-9]
    return min(routed_kl(decoder, decoder, tokens, c, None, 1.0) for c in affordable)


def test_training_beats_the_static_subnetworks_at_equal_average_cost_and_is_reproducible() -> None:
    router, again, steps = new_router(), new_router(), []
    decoder, blocks = toy_decoder(), toy_blocks(96)
    before = weights_of(decoder)
    result = train_token_router(
        decoder, decoder, router, TABLE, STATIC, blocks, recipe(), on_step=lambda *args: steps.append(args[:2])
    )
    held = torch.from_numpy(blocks.tokens[-32:]).long()
    for target, spec in STATIC.items():
        # not only below the given static sub-network, but below the best of all that cost as much
        assert result.routed_kl[target] < best_static_kl(spec, held) <= result.static_kl[target] * (1 + 1e-6)
        assert result.cost_ratio[target] == pytest.approx(1, abs=0.02)
    assert steps == [(i + 1, 9) for i in range(9)]
    assert (len(result.warm_history), len(result.joint_history)) == (3, 6)
    assert same_weights(before, weights_of(decoder))
    assert run(again) == result
    assert again.prices == router.prices
    for name, value in router.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for target, spec in STATIC.items():
        assert routed_kl(decoder, decoder, held, spec, router, target) == pytest.approx(result.routed_kl[target])
        assert routed_kl(decoder, decoder, held, spec, None, target) == pytest.approx(result.static_kl[target])


def test_a_joint_stage_that_harms_is_undone() -> None:
    router, warm = new_router(), new_router()
    harmed = run(router, router_lr=3.0, joint_steps=4, grad_clip=1e3)
    untouched = run(warm, joint_steps=0)
    assert harmed.kept == untouched.kept == "warm"
    assert harmed.routed_kl == untouched.routed_kl == untouched.warm_kl
    assert router.prices == warm.prices
    assert all(torch.equal(v, warm.state_dict()[k]) for k, v in router.state_dict().items())


def test_the_model_trains_where_it_is_told_to_and_its_teacher_and_embeddings_do_not() -> None:
    decoder, teacher = toy_decoder(), toy_decoder()
    before = weights_of(decoder)
    router = new_router().requires_grad_(False)  # as training leaves it
    result = train_token_router(
        decoder, teacher, router, TABLE, STATIC, toy_blocks(96), recipe(model_lr=1e-4, joint_steps=3)
    )
    after = weights_of(decoder)
    assert result.kept == "joint"
    frozen = {"embedding.weight", "head.weight"}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert same_weights(before, weights_of(teacher))
    assert not any(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize(
    ("changes", "specs", "message"),
    [
        ({"model_lr": 1e-4}, STATIC, "pass a copy of the original"),
        ({"heldout_blocks": 96}, STATIC, "give more text or lower heldout_blocks"),
        ({}, {}, r"needs targets in \(0, 1\]"),
        ({}, {1.5: SPACE.full}, r"needs targets in \(0, 1\]"),
        ({}, {0.5: SubnetSpec.of([16] * 3, [2] * 3)}, "MLP width 16 is not among"),
        ({}, {0.5: SubnetSpec.of([8] * 2, [2] * 2)}, "2 layers"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    changes: dict[str, Any], specs: dict[float, SubnetSpec], message: str
) -> None:
    decoder = toy_decoder()
    with pytest.raises(FlextronError, match=message):
        train_token_router(decoder, decoder, new_router(), TABLE, specs, toy_blocks(96), recipe(**changes))


def test_recipes_refuse_unknown_keys_and_do_not_change() -> None:
    with pytest.raises(ValidationError):
        recipe(temperature=1.0)
    with pytest.raises(ValidationError):
        recipe().tau_start = 2.0  # type: ignore[misc]

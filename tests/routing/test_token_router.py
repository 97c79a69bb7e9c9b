"""The token router's choices against its definition, written out; calibration against a count of what was chosen."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams, generate
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.routing.token_calibration import calibrate, routed_cost, score_routed
from flextron.routing.token_router import TokenRouter
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SearchSpace, SubnetSpec
from tests.checkpoints.families_cases import CASES, decoder_of, random_from, random_tokens
from tests.token_toy import HIDDEN, STATIC, opinionated_router
from tests.toy import FULL_ONLY, SPACE, TABLE, synthetic_ms, toy_decoder

WIDTHS = (0, 8, 24, 40)
FULL_MS = synthetic_ms(SPACE.full)
COSTS = [0.02 * w / FULL_MS for w in WIDTHS]


def states(num_tokens: int = 50, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def logits_by_definition(router: TokenRouter, layer: int, x_D: Tensor, target: float) -> list[float]:
    """One token's logits, from the parameters by name."""
    w = {name: p.double() for name, p in router.state_dict().items()}

    def leaky(t: Tensor) -> Tensor:
        return torch.where(t > 0, t, 0.01 * t)

    x = x_D.double() / w["input_rms_L"][layer]
    embedded = leaky(w["embedding.weight"][:, 0] * (1 - target) + w["embedding.bias"])
    hidden = leaky(w[f"first.{layer}.weight"] @ torch.cat((x, embedded)) + w[f"first.{layer}.bias"])
    logits = [-math.exp(v) / float(w["unit"]) for v in w[f"second.{layer}.weight"] @ hidden + w[f"second.{layer}.bias"]]
    if layer not in SPACE.skippable_layers:
        logits[0] = -math.inf
    return [*logits, 0.0]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("target", [0.4, 1.0])
def test_logits_follow_the_definition(layer: int, target: float) -> None:
    router, x = opinionated_router(), states()
    router.input_rms_L.copy_(torch.tensor([2.0, 3.0, 4.0]))
    expected = torch.tensor([logits_by_definition(router, layer, t, target) for t in x])
    torch.testing.assert_close(router.logits(layer, x, target), expected.float(), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 2), st.floats(0.1, 1), st.floats(0, 300))
def test_choices_maximise_the_logit_less_the_price_of_time(layer: int, target: float, price: float) -> None:
    router, x = opinionated_router(), states(8)
    widths, gates = router.at(target, price)(layer, x)
    assert gates is None
    for token, width in zip(x, widths.tolist(), strict=True):
        logits = logits_by_definition(router, layer, token, target)
        scores = {w: s - price * c for w, s, c in zip(WIDTHS, logits, COSTS, strict=True)}
        assert scores[width] >= max(scores.values()) - 1e-3 * (1 + abs(scores[width]))


@given(st.integers(0, 2), st.floats(0, 100), st.floats(0, 100))
def test_a_higher_price_never_widens(layer: int, one: float, other: float) -> None:
    router, x = opinionated_router(), states(20)
    cheap, dear = (router.at(0.7, price)(layer, x)[0] for price in sorted((one, other)))
    assert (dear <= cheap).all()


def test_the_ends_of_the_price_and_layers_that_may_not_be_skipped() -> None:
    router, x = opinionated_router(), states()
    for layer, least in enumerate((8, 0, 8)):
        assert set(router.at(0.7, 0.0)(layer, x)[0].tolist()) == {40}
        assert set(router.at(0.7, 1e12)(layer, x)[0].tolist()) == {least}


def test_prices_are_interpolated_between_targets() -> None:
    router = opinionated_router()
    router.prices = {0.5: 10.0, 0.9: 2.0, 0.7: 8.0}
    assert [router.price(t) for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == pytest.approx([10, 9, 8, 5, 2])
    router.prices = {0.5: 10.0}
    assert router.price(0.5) == 10.0


def test_targets_that_cannot_be_met_are_refused() -> None:
    router = opinionated_router()
    with pytest.raises(FlextronError, match="no prices yet; calibrate or train"):
        router.at(0.5)
    router.prices = {0.5: 1.0, 0.9: 0.5}
    for target in (0.4, 0.95):
        with pytest.raises(FlextronError, match=r"from 0\.5 to 0\.9, not .*choose one in between"):
            router.at(target)
    for target in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(FlextronError, match=r"fraction of the full latency in \(0, 1\]"):
            router.at(target, 1.0)


def other_config() -> DecoderConfig:
    config = copy.deepcopy(CASES["llama"])
    config.num_hidden_layers = 2
    return decoder_of(random_from(config)).config


def test_routers_of_another_model_or_space_are_refused() -> None:
    router, decoder = opinionated_router(), toy_decoder()
    router.check(decoder.config, STATIC[0.8])
    with pytest.raises(FlextronError, match="train a router for this model"):
        router.check(other_config(), STATIC[0.8])
    with pytest.raises(FlextronError, match="MLP width 16 is not among"):
        router.check(decoder.config, SubnetSpec.of([16, 16, 16], [2, 2, 2]))
    with pytest.raises(FlextronError, match="measure a latency table of this model"):
        TokenRouter.for_table(FULL_ONLY, HIDDEN, TABLE)
    with pytest.raises(FlextronError, match="MLP width 16"):
        generate(
            decoder, [[1]], SubnetSpec.of([16] * 3, [2] * 3), SamplingParams(max_tokens=1), router.at(0.5, price=1.0)
        )


def test_rebuilt_routers_choose_alike() -> None:
    router, x = opinionated_router(), states()
    router.prices = {0.5: 10.0, 0.9: 2.0}
    loaded = TokenRouter.from_dict(json.loads(json.dumps(router.to_dict())), router.state_dict())
    assert loaded.to_dict() == router.to_dict()
    assert loaded.prices == router.prices
    for layer in range(3):
        assert torch.equal(loaded.at(0.6)(layer, x)[0], router.at(0.6)(layer, x)[0])
        assert torch.equal(loaded.logits(layer, x, 0.6), router.logits(layer, x, 0.6))
    assert len({int(w) for w in router.at(0.6)(1, x)[0]}) > 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, tensors: tensors.pop("unit"),
        lambda data, tensors: tensors.update(unknown=torch.zeros(1)),
        lambda data, tensors: data.pop("specs"),
        lambda data, tensors: data.update(unknown=1),
        lambda data, tensors: data.update(num_units=13),
        lambda data, tensors: data.update(prices=None),
        lambda data, tensors: data.update(space={}),
    ],
)
def test_damaged_routers_are_refused(damage: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    router = opinionated_router()
    data, tensors = router.to_dict(), router.state_dict()
    damage(data, tensors)
    with pytest.raises(FlextronError, match=r"token router.*; train it again") as raised:
        TokenRouter.from_dict(data, tensors)
    assert "\n" not in str(raised.value)


class Watching:
    """Remembers each token's widths, layer by layer."""

    def __init__(self, router: Any) -> None:
        self.router, self.seen = router, dict[int, list[int]]()

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, None]:
        widths, _ = self.router(layer, x_ND)
        self.seen.setdefault(layer, []).extend(widths.tolist())
        return widths, None

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        self.router.check(config, spec)

    def fractions(self, spec: SubnetSpec) -> list[float]:
        """Each token's time, as if a whole network had its widths."""
        specs = [SubnetSpec.of(widths, spec.num_groups) for widths in zip(*self.seen.values(), strict=True)]
        return [synthetic_ms(s) / FULL_MS for s in specs]


def watched(router: TokenRouter, target: float, tokens: Tensor, spec: SubnetSpec, price: float | None) -> list[float]:
    watching, decoder = Watching(router.at(target, price)), toy_decoder()
    with torch.no_grad():
        decoder(Batch.padded(tokens, spec, watching))
    return watching.fractions(spec)


def test_calibrated_average_costs_meet_the_static_subnetworks() -> None:
    router, tokens, fresh = opinionated_router(), random_tokens(40, 16), random_tokens(40, 16, seed=2)
    ratios = calibrate(router, toy_decoder(), tokens, STATIC, TABLE)
    assert router.prices.keys() == ratios.keys() == STATIC.keys()
    for target, spec in STATIC.items():
        assert ratios[target] == pytest.approx(1, abs=0.02)
        for text, tolerance in ((tokens, 0.02), (fresh, 0.03)):
            fractions = watched(router, target, text, spec, None)
            assert sum(fractions) / len(fractions) == pytest.approx(synthetic_ms(spec) / FULL_MS, rel=tolerance)


def test_a_target_that_is_the_full_network_costs_nothing_to_calibrate() -> None:
    router = opinionated_router()
    assert calibrate(router, toy_decoder(), random_tokens(4, 8), {1.0: SPACE.full}, TABLE) == {1.0: 1.0}
    assert router.prices == {1.0: 0.0}


def test_calibration_without_targets_is_refused() -> None:
    with pytest.raises(FlextronError, match="at least one target"):
        calibrate(opinionated_router(), toy_decoder(), random_tokens(4, 8), {}, TABLE)


def test_costs_are_those_of_the_tokens_one_by_one() -> None:
    router, tokens, spec = opinionated_router(), random_tokens(7, 9), STATIC[0.8]
    fractions = torch.tensor(watched(router, 0.8, tokens, spec, 20.0), dtype=torch.float64)
    score = score_routed(toy_decoder(), tokens, spec, router.at(0.8, 20.0), TABLE)
    cost = score.cost
    assert score.loss == mean_loss(toy_decoder(), tokens, spec, router.at(0.8, 20.0))
    assert cost == routed_cost(toy_decoder(), tokens, spec, router.at(0.8, 20.0), TABLE)
    assert cost.std > 0.01
    expected = [
        fractions.mean() * FULL_MS,
        fractions.mean(),
        fractions.std(correction=0),
        *fractions.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)),
    ]
    found = [cost.mean_ms, cost.fraction, cost.std, cost.low, cost.high]
    assert found == pytest.approx([float(v) for v in expected])


def test_layers_that_the_spec_skips_stay_skipped_and_cost_nothing() -> None:
    router, tokens = opinionated_router(), random_tokens(7, 9)
    spec = SubnetSpec.of([40, 0, 8], [2, 0, 1])
    cost = routed_cost(toy_decoder(), tokens, spec, router.at(0.8, 0.0), TABLE)
    assert cost.fraction == pytest.approx(synthetic_ms(SubnetSpec.of([40, 0, 40], [2, 0, 1])) / FULL_MS)
    assert cost.mean_width == (40, 0, 40)
    assert cost.std == pytest.approx(0, abs=1e-12)


def test_a_space_without_skips_never_skips() -> None:
    space = SearchSpace(num_hidden_layers=3, intermediate_sizes=(8, 24, 40), num_groups=(1, 2))
    router = TokenRouter.for_table(space, HIDDEN, TABLE)
    assert all(set(router.at(0.5, 1e12)(i, states())[0].tolist()) == {8} for i in range(3))

"""What a step trains: a function of seed, step and micro step; sizes spread over what the annealing allows."""

from __future__ import annotations

import random
from itertools import product

import pytest

from flextron.model.cost import block_parameters
from flextron.routing.sensitivity import Sensitivity
from flextron.spec import SearchSpace, SubnetSpec
from flextron.training.sampling import SubnetSampler, random_subnet, uniform_subnet
from tests.toy import toy_decoder, toy_recipe

STEPS = 40
CONFIG = toy_decoder().config
SPACE = SearchSpace(
    num_hidden_layers=3,
    intermediate_sizes=(4, 8, 16, 24, 40),
    num_groups=(1, 2),
    skippable_layers=(2, 0, 1),
    max_skipped_layers=2,
)


def sensitivity() -> Sensitivity:
    """Costs that fall with the width, different for every half layer."""
    rng = random.Random(0)

    def table(widths: tuple[int, ...]) -> dict[int, float]:
        scale = rng.uniform(0.5, 2)
        return {w: scale * (1 - w / widths[-1]) ** 2 for w in (0, *widths)}

    return Sensitivity(
        mlp=tuple(table(SPACE.intermediate_sizes) for _ in range(3)),
        attention=tuple(table(SPACE.num_groups) for _ in range(3)),
    )


def sampler(**changes: object) -> SubnetSampler:
    recipe = toy_recipe(steps=STEPS, **changes)
    return SubnetSampler(config=CONFIG, space=SPACE, sensitivity=sensitivity(), recipe=recipe, num_steps=STEPS)


def relative_size(spec: SubnetSpec) -> float:
    return block_parameters(CONFIG, spec) / block_parameters(CONFIG, SPACE.full)


def test_a_draw_depends_on_seed_step_and_micro_step_alone() -> None:
    first, second = sampler(), sampler()
    places = list(product(range(12, 18), range(3)))
    forwards = {place: first.draw(*place, 4) for place in places}
    backwards = {place: second.draw(*place, 4) for place in reversed(places)}
    assert forwards == backwards
    # and on each of them
    assert len({tuple(specs) for specs in forwards.values()}) > len(places) // 2
    other = sampler(seed=1)
    assert any(other.draw(*place, 4) != forwards[place] for place in places)


@pytest.mark.parametrize(("full", "anything"), [(0.2, 0.2), (0.0, 1.0), (0.0, 0.0)])
def test_every_draw_lies_in_the_space(full: float, anything: float) -> None:
    drawn = sampler(full_probability=full, random_probability=anything, min_size=0.1)
    specs = {spec for step in range(STEPS) for spec in drawn.draw(step, 0, 5)}
    assert len(specs) > 20
    for spec in specs:
        SPACE.check(spec)


def test_random_sub_networks_follow_their_size_and_use_every_choice() -> None:
    rng = random.Random(0)
    drawn = {size: [random_subnet(SPACE, size, rng) for _ in range(300)] for size in (0.0, 0.5, 1.0)}
    means = [sum(map(relative_size, specs)) / len(specs) for specs in drawn.values()]
    assert means == sorted(means)
    assert means[2] > 0.7 > 0.5 > means[0]
    everything = [spec for specs in drawn.values() for spec in specs]
    assert all(spec in SPACE for spec in everything)
    for i in range(3):
        assert {s.intermediate_sizes[i] for s in everything} == {0, *SPACE.intermediate_sizes}
        assert {s.num_groups[i] for s in everything} == {0, *SPACE.num_groups}
    skips = [sum(i not in s.kept_layers for s in everything) for i in SPACE.skippable_layers]
    assert skips == sorted(skips, reverse=True), "the least important layers are skipped most"


def test_the_smallest_size_comes_in_gradually() -> None:
    drawn = sampler(min_size=0.4, anneal_fraction=0.5)
    floors = [drawn.floor(step) for step in range(STEPS)]
    assert floors[0] > 0.9
    assert floors[:20] == sorted(set(floors[:20]), reverse=True)
    assert floors[9] == pytest.approx(0.7)
    assert floors[19:] == pytest.approx([0.4] * 21)
    assert sampler(min_size=0.4, anneal_fraction=0.0).floor(0) == pytest.approx(0.4)


@pytest.mark.parametrize("tilt", [1.0, 3.0])
def test_sizes_are_stratified_between_floor_and_full(tilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []

    def recorded(self: SubnetSampler, size: float, rng: random.Random) -> SubnetSpec:
        sizes.append(size)
        return SPACE.full

    monkeypatch.setattr(SubnetSampler, "guided", recorded)
    drawn = sampler(full_probability=0.0, random_probability=0.0, min_size=0.2, anneal_fraction=0.5, tilt=tilt)
    for step in range(STEPS):
        sizes.clear()
        drawn.draw(step, 0, 4)
        floor = drawn.floor(step)
        quantiles = [((size - floor) / (1 - floor)) ** tilt for size in sizes]
        # the largest first, one in each quarter
        assert [int(4 * q - 1e-9) for q in quantiles] == [3, 2, 1, 0]


def test_guided_sub_networks_keep_to_their_size() -> None:
    drawn = sampler()
    rng = random.Random(1)
    smallest = relative_size(SPACE.smallest)
    for size in (smallest, 0.2, 0.4, 0.55, 0.8, 1.0):
        for spec in [drawn.guided(size, rng) for _ in range(20)]:
            assert spec in SPACE
            # within the size for some overhead between none and the largest; the excess is linear in it
            kept = len(spec.kept_layers) / SPACE.num_hidden_layers
            excess = [relative_size(spec) + overhead * kept - size * (1 + overhead) for overhead in (0.0, 0.6)]
            assert min(excess) <= 1e-9 or spec == SPACE.smallest
    assert drawn.guided(1.0, rng) == SPACE.full
    assert len({drawn.guided(0.5, rng) for _ in range(20)}) > 5, "perturbed costs lead elsewhere"


def test_the_full_network_comes_as_often_as_asked() -> None:
    drawn = sampler(full_probability=0.3, random_probability=0.0, min_size=0.2, anneal_fraction=0.0)
    # nothing but the smaller half, so that no other draw is the full one
    specs = [drawn.draw(step, m, 2)[1] for step in range(STEPS) for m in range(15)]
    share = sum(spec == SPACE.full for spec in specs) / len(specs)
    # three standard deviations of 600 draws
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / 600) ** 0.5
    never = sampler(full_probability=0.0, random_probability=0.0, min_size=0.2, anneal_fraction=0.0)
    assert all(never.draw(step, 0, 2)[1] != SPACE.full for step in range(STEPS))
    always = sampler(full_probability=1.0, random_probability=0.0)
    assert set(always.draw(7, 0, 6)) == {SPACE.full}


def test_uniform_sampling_draws_equal_layers_of_at_most_their_size() -> None:
    drawn = sampler(sampling="uniform", full_probability=0.0, min_size=0.2, anneal_fraction=0.0)
    specs = [spec for step in range(STEPS) for spec in drawn.draw(step, 0, 4)]
    assert len(set(specs)) >= 3
    for spec in specs:
        assert spec in SPACE
        assert len(set(spec.layers)) == 1


def test_the_uniform_sub_network_of_a_size_is_the_largest_within_it() -> None:
    pairs = [SPACE.uniform(w, 1 if w <= 30 else 2) for w in SPACE.intermediate_sizes]
    for size in (0.3, 0.5, 0.7, 0.99, 1.0):
        fitting = [spec for spec in pairs if relative_size(spec) <= size]
        assert uniform_subnet(CONFIG, SPACE, size) == max(fitting, key=relative_size)
    assert uniform_subnet(CONFIG, SPACE, 0.01) == pairs[0], "the smallest there is"


def test_random_sampling_mixes_widths_and_needs_no_sensitivities() -> None:
    recipe = toy_recipe(steps=STEPS, sampling="random", full_probability=0.0, random_probability=0.0)
    drawn = SubnetSampler(config=CONFIG, space=SPACE, sensitivity=None, recipe=recipe, num_steps=STEPS)
    specs = [spec for step in range(STEPS) for spec in drawn.draw(step, 0, 4)]
    assert all(spec in SPACE for spec in specs)
    assert sum(len({spec.layers[i] for i in spec.kept_layers}) > 1 for spec in specs) > len(specs) // 4


def test_listed_sizes_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []

    def recorded(self: SubnetSampler, size: float, rng: random.Random) -> SubnetSpec:
        sizes.append(size)
        return SPACE.full

    monkeypatch.setattr(SubnetSampler, "guided", recorded)
    drawn = sampler(sizes=(0.8, 0.5, 0.3), full_probability=0.0, random_probability=0.0, anneal_fraction=0.0)
    for step in range(STEPS):
        sizes.clear()
        drawn.draw(step, 0, 6)
        assert sorted(sizes) == pytest.approx([0.3, 0.3, 0.5, 0.5, 0.8, 0.8])
    annealed = sampler(sizes=(0.8, 0.3), full_probability=0.0, random_probability=0.0, anneal_fraction=1.0)
    sizes.clear()
    annealed.draw(STEPS // 2 - 1, 0, 2)
    assert sorted(sizes) == pytest.approx([0.65, 0.8]), "halfway from 1 to the smallest listed one"


def test_given_sub_networks_are_all_that_is_drawn_each_as_often() -> None:
    specs = (SPACE.full, SPACE.smallest, SPACE.uniform(8, 2))
    recipe = toy_recipe(steps=STEPS, full_probability=1.0)
    drawn = SubnetSampler(config=CONFIG, space=SPACE, sensitivity=None, recipe=recipe, num_steps=STEPS, specs=specs)
    for step in range(STEPS):
        assert set(drawn.draw(step, 0, 3)) == set(specs)
    single = [drawn.draw(step, 0, 1)[0] for step in range(3 * STEPS)]
    assert min(map(single.count, specs)) > STEPS // 2

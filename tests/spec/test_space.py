"""SearchSpace: membership and size against brute-force enumeration, JSON, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.spec import SearchSpace, SubnetSpec


def choices(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, most), min_size=1, max_size=2).map(lambda s: tuple(sorted(s)))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Any space of at most three layers and four width pairs: at most some hundred sub-networks."""
    depth = draw(st.integers(1, 3))
    skippable = draw(st.lists(st.integers(0, depth - 1), unique=True))
    return SearchSpace(
        num_hidden_layers=depth,
        intermediate_sizes=draw(choices(4)),
        num_groups=draw(choices(3)),
        skippable_layers=tuple(skippable),
        max_skipped_layers=draw(st.integers(0, min(len(skippable), depth - 1))),
    )


def members(space: SearchSpace) -> Iterator[SubnetSpec]:
    """The definition: each layer takes one of each choice or, where allowed, is skipped; not too many are."""
    widths = list(itertools.product(space.intermediate_sizes, space.num_groups))
    options = [widths + [(0, 0)] * (i in space.skippable_layers) for i in range(space.num_hidden_layers)]
    for layers in itertools.product(*options):
        if layers.count((0, 0)) <= space.max_skipped_layers:
            yield SubnetSpec.of([w for w, _ in layers], [g for _, g in layers])


@st.composite
def spaces_with_a_member(draw: st.DrawFn) -> tuple[SearchSpace, SubnetSpec]:
    space = draw(spaces())
    return space, draw(st.sampled_from(list(members(space))))


def with_layer(spec: SubnetSpec, index: int, intermediate_size: int, num_groups: int) -> SubnetSpec:
    sizes, groups = list(spec.intermediate_sizes), list(spec.num_groups)
    sizes[index], groups[index] = intermediate_size, num_groups
    return SubnetSpec.of(sizes, groups)


def total_width(spec: SubnetSpec) -> tuple[int, int]:
    return sum(spec.intermediate_sizes), sum(spec.num_groups)


@given(spaces())
def test_json_round_trip(space: SearchSpace) -> None:
    back = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert back == space
    assert hash(back) == hash(space)


@given(spaces())
def test_log10_size_counts_the_members(space: SearchSpace) -> None:
    assert space.log10_size == pytest.approx(math.log10(len(set(members(space)))))


@pytest.mark.slow
def test_log10_size_and_membership_in_a_larger_space() -> None:
    space = SearchSpace(
        num_hidden_layers=7,
        intermediate_sizes=(8, 16, 32),
        num_groups=(1, 2),
        skippable_layers=(4, 1, 2),
        max_skipped_layers=2,
    )
    count = 0
    for spec in members(space):
        space.check(spec)
        count += 1
    assert space.log10_size == pytest.approx(math.log10(count))


def test_log10_size_of_a_space_beyond_floats() -> None:
    space = SearchSpace(num_hidden_layers=1000, intermediate_sizes=(1, 2, 3, 4, 5), num_groups=(1, 2))
    assert space.log10_size == pytest.approx(1000.0)


@given(spaces_with_a_member())
def test_every_choice_lies_in_the_space(drawn: tuple[SearchSpace, SubnetSpec]) -> None:
    space, spec = drawn
    space.check(spec)
    assert spec in space


@given(spaces(), st.floats(0, 1), st.randoms(use_true_random=False))
def test_heterogeneous_subnetworks_lie_in_the_space(space: SearchSpace, size: float, rng: random.Random) -> None:
    space.check(space.heterogeneous(size, rng))


def test_heterogeneous_subnetworks_have_every_width_and_number_of_skipped_layers() -> None:
    space = SearchSpace(
        num_hidden_layers=4,
        intermediate_sizes=(8, 16, 32),
        num_groups=(1, 2),
        skippable_layers=(2, 1),
        max_skipped_layers=2,
    )
    rng = random.Random(0)
    specs = [space.heterogeneous(0.5, rng) for _ in range(200)]
    assert {sum(layer.is_skipped for layer in spec.layers) for spec in specs} == {0, 1, 2}
    assert {(x.intermediate_size, x.num_groups) for s in specs for x in s.layers} == {
        (0, 0),
        *itertools.product(space.intermediate_sizes, space.num_groups),
    }


@given(spaces(), st.data())
def test_membership_is_the_definition(space: SearchSpace, data: st.DataObject) -> None:
    """Widths one beyond each choice, half-skipped layers and too many skips are drawn as readily as members."""
    sizes = [data.draw(st.sampled_from([0, *space.intermediate_sizes, 5])) for _ in range(space.num_hidden_layers)]
    groups = [data.draw(st.sampled_from([0, *space.num_groups, 4])) for _ in range(space.num_hidden_layers)]
    spec = SubnetSpec.of(sizes, groups)
    assert (spec in space) == (spec in set(members(space)))


@given(spaces_with_a_member(), st.data())
def test_one_layer_outside_the_choices_is_refused(drawn: tuple[SearchSpace, SubnetSpec], data: st.DataObject) -> None:
    space, spec = drawn
    index = data.draw(st.integers(0, space.num_hidden_layers - 1))
    size, groups = space.intermediate_sizes[-1], space.num_groups[-1]
    with pytest.raises(FlextronError, match=rf"layer {index}: MLP width {size + 1} is not among"):
        space.check(with_layer(spec, index, size + 1, groups))
    with pytest.raises(FlextronError, match=rf"layer {index}: {groups + 1} groups is not among"):
        space.check(with_layer(spec, index, size, groups + 1))
    with pytest.raises(FlextronError, match=rf"layer {index}: MLP width 0 is not among"):
        space.check(with_layer(spec, index, 0, groups))
    with pytest.raises(FlextronError, match=rf"layer {index}: 0 groups is not among"):
        space.check(with_layer(spec, index, size, 0))


@given(spaces_with_a_member())
def test_another_depth_is_refused(drawn: tuple[SearchSpace, SubnetSpec]) -> None:
    space, spec = drawn
    deeper = SubnetSpec(layers=(*spec.layers, spec.layers[0]))
    with pytest.raises(FlextronError, match=rf"{len(deeper.layers)} layers, the model {space.num_hidden_layers}"):
        space.check(deeper)


@given(spaces_with_a_member())
def test_everything_is_nested_in_full_and_nothing_is_narrower_than_smallest(
    drawn: tuple[SearchSpace, SubnetSpec],
) -> None:
    space, spec = drawn
    assert space.full in space
    assert space.smallest in space
    assert spec.is_nested_in(space.full)
    assert spec == space.smallest or not spec.is_nested_in(space.smallest)
    assert all(a <= b for a, b in zip(total_width(space.smallest), total_width(spec), strict=True)), (
        "another choice runs fewer neurons or groups"
    )


@given(spaces_with_a_member())
def test_smallest_is_nested_in_everything_where_skipping_leaves_no_choice(
    drawn: tuple[SearchSpace, SubnetSpec],
) -> None:
    """Where more layers may be skipped than at once, two specs can skip different ones: neither contains the other."""
    space, spec = drawn
    assume(space.max_skipped_layers == len(space.skippable_layers))
    assert space.smallest.is_nested_in(spec)


def test_smallest_skips_the_least_important_layers() -> None:
    space = SearchSpace(
        num_hidden_layers=4,
        intermediate_sizes=(2, 4),
        num_groups=(1, 3),
        skippable_layers=(3, 0, 1),
        max_skipped_layers=2,
    )
    assert space.smallest == SubnetSpec.of([0, 2, 2, 0], [0, 1, 1, 0])
    assert space.full == SubnetSpec.of([4] * 4, [3] * 4)


def test_from_ratios_rounds_to_whole_multiples_and_keeps_the_full_width() -> None:
    space = SearchSpace.from_ratios(
        num_hidden_layers=2, intermediate_size=1536, num_groups=3, ratios=[0.01, 0.5, 0.6], multiple_of=64
    )
    assert space.intermediate_sizes == (64, 768, 896, 1536)  # 0.6 · 1536 = 921.6, nearest multiple 14 · 64
    assert space.num_groups == (1, 2, 3)


@given(st.lists(st.floats(0.001, 1.0), max_size=6), st.integers(1, 40), st.integers(1, 16), st.integers(1, 12))
def test_from_ratios_stays_within_half_a_multiple(
    ratios: list[float], multiples: int, multiple_of: int, num_groups: int
) -> None:
    full = multiples * multiple_of
    space = SearchSpace.from_ratios(
        num_hidden_layers=1, intermediate_size=full, num_groups=num_groups, ratios=ratios, multiple_of=multiple_of
    )
    assert space.full == SubnetSpec.of([full], [num_groups])
    assert all(size % multiple_of == 0 for size in space.intermediate_sizes)
    for wanted in (max(r * full, multiple_of) for r in ratios):
        assert min(abs(size - wanted) for size in space.intermediate_sizes) <= multiple_of / 2 + 1e-6
    for wanted in (max(r * num_groups, 1) for r in ratios):
        assert min(abs(groups - wanted) for groups in space.num_groups) <= 0.5 + 1e-6


def space_with(**changes: object) -> Callable[[], SearchSpace]:
    base: dict[str, object] = {"num_hidden_layers": 3, "intermediate_sizes": [2, 4], "num_groups": [1, 2]}
    return lambda: SearchSpace.from_dict({**base, **changes})


def ratios_with(**changes: object) -> Callable[[], SearchSpace]:
    base = {"num_hidden_layers": 2, "intermediate_size": 64, "num_groups": 4, "ratios": [0.5], "multiple_of": 16}
    return lambda: SearchSpace.from_ratios(**{**base, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (space_with(intermediate_sizes=[]), r"intermediate_sizes must be positive sizes in ascending order"),
        (space_with(intermediate_sizes=[4, 2]), r"ascending order without repeats, not \[4, 2\]"),
        (space_with(intermediate_sizes=[4, 2] * 2000), r"^.{20,300}$"),
        (space_with(num_groups=[1, 1]), r"num_groups must be .* without repeats, not \[1, 1\]"),
        (space_with(num_groups=[0, 1]), r"num_groups must be positive sizes"),
        (space_with(num_hidden_layers=0), r"num_hidden_layers must be at least 1, not 0"),
        (space_with(skippable_layers=[1, 1]), r"skippable_layers must be distinct layers below 3"),
        (space_with(skippable_layers=[3]), r"skippable_layers must be distinct layers below 3"),
        (space_with(skippable_layers=[-1]), r"skippable_layers must be distinct layers below 3"),
        (space_with(skippable_layers=[1], max_skipped_layers=2), r"max_skipped_layers must lie between 0 and 1"),
        (space_with(max_skipped_layers=-1), r"max_skipped_layers must lie between 0 and 0"),
        (space_with(skippable_layers=[0, 1, 2], max_skipped_layers=3), r"at least one layer must stay"),
        (space_with(depth=3), r"search space is malformed \(depth: "),
        (
            lambda: SearchSpace.from_dict({"num_hidden_layers": 3}),
            r"search space is malformed \(intermediate_sizes: .*convert",
        ),
        (ratios_with(ratios=[0.0]), r"ratios must lie in \(0, 1\]"),
        (ratios_with(ratios=[1.5]), r"ratios must lie in \(0, 1\]"),
        (ratios_with(ratios=[math.nan]), r"ratios must lie in \(0, 1\]"),
        (ratios_with(multiple_of=48), r"MLP width 64 is not a multiple of 48; choose one that divides it"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(make: Callable[[], SearchSpace], remedy: str) -> None:
    with pytest.raises(FlextronError, match=remedy):
        make()


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ([0, 2, 2, 2], r"layer 0 may not be skipped; only \[1, 2\] may"),
        ([2, 0, 0, 2], r"2 layers are skipped; at most 1 may be"),
    ],
)
def test_skipping_against_the_rules_is_refused(sizes: list[int], remedy: str) -> None:
    space = SearchSpace(
        num_hidden_layers=4,
        intermediate_sizes=(2,),
        num_groups=(1,),
        skippable_layers=(1, 2),
        max_skipped_layers=1,
    )
    with pytest.raises(FlextronError, match=remedy):
        space.check(SubnetSpec.of(sizes, [min(s, 1) for s in sizes]))

"""SubnetSpec: JSON, the nesting order against its definition by sets of neurons, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.spec import LayerSpec, SubnetSpec

WIDTHS = st.integers(0, 3)


def specs(num_layers: int | None = None) -> st.SearchStrategy[SubnetSpec]:
    """Any sub-network of `num_layers` layers, or of one to four."""
    lengths = st.integers(1, 4) if num_layers is None else st.just(num_layers)
    return lengths.flatmap(
        lambda n: st.builds(
            SubnetSpec.of, st.lists(WIDTHS, min_size=n, max_size=n), st.lists(WIDTHS, min_size=n, max_size=n)
        )
    )


def parts(spec: SubnetSpec) -> set[tuple[int, str, int]]:
    """Every neuron and group that runs, by layer and index: the definition that widths abbreviate."""
    return {
        (i, half, index)
        for i, layer in enumerate(spec.layers)
        for half, width in (("mlp", layer.intermediate_size), ("attention", layer.num_groups))
        for index in range(width)
    }


@given(specs())
def test_json_round_trip(spec: SubnetSpec) -> None:
    back = SubnetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert back == spec
    assert hash(back) == hash(spec)


@given(specs(3), specs(3))
def test_nesting_is_inclusion_of_the_parts_that_run(a: SubnetSpec, b: SubnetSpec) -> None:
    assert a.is_nested_in(b) == (parts(a) <= parts(b))


@given(specs(2), specs(2), specs(2))
def test_nesting_is_a_partial_order(a: SubnetSpec, b: SubnetSpec, c: SubnetSpec) -> None:
    assert a.is_nested_in(a)
    if a.is_nested_in(b) and b.is_nested_in(a):
        assert a == b
    if a.is_nested_in(b) and b.is_nested_in(c):
        assert a.is_nested_in(c)


@given(specs(3), st.data())
def test_narrowing_any_widths_gives_a_chain(wide: SubnetSpec, data: st.DataObject) -> None:
    """The order on chains that are built, where random triples are seldom comparable."""

    def narrowed(spec: SubnetSpec) -> SubnetSpec:
        sizes = [data.draw(st.integers(0, w)) for w in spec.intermediate_sizes]
        return SubnetSpec.of(sizes, [data.draw(st.integers(0, g)) for g in spec.num_groups])

    middle = narrowed(wide)
    narrow = narrowed(middle)
    assert middle.is_nested_in(wide)
    assert narrow.is_nested_in(middle)
    assert narrow.is_nested_in(wide)
    assert not wide.is_nested_in(narrow) or wide == narrow


def test_different_depths_are_never_nested() -> None:
    shallow, deep = SubnetSpec.of([1], [1]), SubnetSpec.of([2, 2], [2, 2])
    assert not shallow.is_nested_in(deep)
    assert not deep.is_nested_in(shallow)


@given(specs())
def test_kept_layers_are_those_with_a_part_that_runs(spec: SubnetSpec) -> None:
    assert spec.kept_layers == tuple(sorted({i for i, _, _ in parts(spec)}))


def test_uniform_skips_whole_layers() -> None:
    spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=8, num_groups=2, skip=[1])
    assert spec == SubnetSpec.of([8, 0, 8], [2, 0, 2])
    assert spec.is_uniform


@pytest.mark.parametrize(
    ("sizes", "groups", "expected"),
    [
        ([8, 8], [2, 2], True),
        ([8, 0], [2, 0], True),
        ([8, 4], [2, 2], False),
        ([8, 8], [2, 1], False),
        ([0, 0], [2, 2], False),
        ([8, 8], [0, 0], False),
        ([0, 0], [0, 0], False),
    ],
)
def test_is_uniform_means_an_ordinary_dense_model(sizes: list[int], groups: list[int], expected: bool) -> None:
    assert SubnetSpec.of(sizes, groups).is_uniform is expected


@pytest.mark.parametrize(
    ("sizes", "groups", "expected"),
    [
        ([8, 8], [2, 2], "2/2 layers, MLP 8, groups 2"),
        ([8, 0, 4], [2, 0, 1], "2/3 layers, MLP 4-8, groups 1-2"),
        ([0, 0], [0, 0], "0/2 layers"),
    ],
)
def test_describe(sizes: list[int], groups: list[int], expected: str) -> None:
    assert SubnetSpec.of(sizes, groups).describe() == expected


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: LayerSpec(intermediate_size=-1, num_groups=1), r"intermediate_size must be .* at least 0, not -1"),
        (lambda: LayerSpec(intermediate_size=1, num_groups=-2), r"num_groups must be .* at least 0, not -2"),
        (lambda: LayerSpec(intermediate_size=1.5, num_groups=1), r"a whole number .* not 1\.5"),
        (lambda: LayerSpec(intermediate_size=1, num_groups=True), r"a whole number .* not True"),
        (lambda: SubnetSpec(layers=()), r"give one entry for each layer"),
        (lambda: SubnetSpec.of([8, 8], [2]), r"2 MLP widths but 1 attention widths; give one of each a layer"),
        (lambda: SubnetSpec.from_dict({"intermediate_size": [8]}), r"exactly the keys \['intermediate_size', 'num_g"),
        (
            lambda: SubnetSpec.from_dict({"intermediate_size": [8], "num_groups": [1], "depth": 2}),
            r"exactly the keys .* found \['depth', ",
        ),
        (lambda: SubnetSpec.from_dict({"intermediate_size": ["8"], "num_groups": [1]}), r"a whole number .* not '8'"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(make: Callable[[], object], remedy: str) -> None:
    with pytest.raises(FlextronError, match=remedy):
        make()

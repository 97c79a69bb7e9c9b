"""Where requests go, as a plain function."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.replicas.routes import JOBS, Routes, State, Wanted, bound, wanted_of

LOADS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 60), min_size=1)
WANTED = st.builds(
    Wanted,
    model=st.sampled_from(["", "x", "x@0.5", "y"]),
    beginnings=st.lists(st.integers(0, 5), max_size=4, unique=True).map(tuple),
)


def states(loads: dict[str, int]) -> dict[str, State]:
    return {replica: State(load=load) for replica, load in loads.items()}


def wanted(body: dict[str, Any], path: str = "/v1/chat/completions") -> Wanted:
    return wanted_of("POST", path, json.dumps(body).encode(), "m", has_jobs=True)


@given(st.lists(st.tuples(WANTED, LOADS), min_size=1, max_size=20))
def test_every_replica_is_named_once(asked: list[tuple[Wanted, dict[str, int]]]) -> None:
    routes = Routes(0)
    for want, loads in asked:
        assert sorted(routes.order(want, states(loads))) == sorted(loads)


@given(st.lists(st.tuples(WANTED, LOADS), min_size=1, max_size=20))
def test_nobody_is_preferred_beyond_the_bound(asked: list[tuple[Wanted, dict[str, int]]]) -> None:
    routes = Routes(0)
    for want, loads in asked:
        first, *others = routes.order(want, states(loads))
        # the better of two at random is never worse than the last but one
        drawn = sorted(loads.values())[-2] if others else loads[first]
        assert loads[first] <= max(bound(min(loads.values())), drawn)


@given(WANTED.filter(lambda w: w.model or w.beginnings), LOADS.filter(lambda loads: len(loads) > 1), st.data())
def test_the_holder_gets_the_next_one(want: Wanted, loads: dict[str, int], data: st.DataObject) -> None:
    routes, equal = Routes(1), dict.fromkeys(loads, 3)
    holder = routes.order(want, states(equal))[0]
    longer = Wanted(want.kind, want.model, (*want.beginnings, 77))
    for other in (want, longer):
        assert routes.order(other, states(equal))[0] == holder
    # also a little more loaded than the others, and not much more
    assert routes.order(want, states(equal | {holder: data.draw(st.integers(0, 7))}))[0] == holder
    assert routes.order(want, states(equal | {holder: 8}))[0] != holder


@pytest.mark.parametrize("num_replicas", [2, 5])
def test_a_hot_adapter_spreads(num_replicas: int) -> None:
    routes, loads = Routes(2), Counter({str(i): 0 for i in range(num_replicas)})
    hot = Wanted(model="hot")
    for _ in range(100):
        loads[routes.order(hot, states(dict(loads)))[0]] += 1
    assert max(loads.values()) <= bound(min(loads.values())) + 1
    # and a cold one that a replica has loaded stays there
    told = {replica: State(load=9, adapters=frozenset({"cold"} if replica == "1" else ())) for replica in loads}
    assert {routes.order(Wanted(model="cold@0.5"), told)[0] for _ in range(20)} == {"1"}


def test_without_anything_held_the_load_is_even() -> None:
    routes, loads = Routes(3), Counter({str(i): 0 for i in range(8)})
    for _ in range(8000):
        loads[routes.order(Wanted(), states(dict(loads)))[0]] += 1
    assert max(loads.values()) - min(loads.values()) < 10


def test_jobs_go_to_their_owner() -> None:
    routes = Routes(4)
    told = {"a": State(load=0), "b": State(load=50, owns_jobs=True), "c": State(load=1)}
    assert routes.order(Wanted(JOBS), told) == ["b", "a", "c"]


def test_a_replica_that_is_gone_is_forgotten() -> None:
    routes, want = Routes(5), Wanted(beginnings=(1,))
    holder = routes.order(want, states({"a": 0, "b": 0}))[0]
    other = next(iter({"a", "b"} - {holder}))
    assert routes.order(want, states({other: 0})) == [other]


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_what_follows_keeps_the_beginning(text: str, more: str) -> None:
    first = wanted({"model": "m", "messages": [{"role": "user", "content": text}]})
    following = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": more},
    ]
    second = wanted({"model": "m", "messages": following})
    # the last block holds the end of the list
    assert second.beginnings[: len(first.beginnings) - 1] == first.beginnings[: len(first.beginnings) - 1]
    assert len(second.beginnings) >= len(first.beginnings)


def test_pages_of_other_sub_networks_and_adapters_are_others() -> None:
    text = {"prompt": "word " * 200}
    asked = [{"model": "m"}, {"model": "m@0.5"}, {"model": "ft:x"}, {"model": "m", "flextron": {"latency": 0.5}}]
    found = [wanted(text | body) for body in asked]
    assert all(len(want.beginnings) == 3 for want in found)
    assert len({want.beginnings[0] for want in found}) == 4
    assert [want.model for want in found] == ["", "m@0.5", "ft:x", 'm{"latency": 0.5}']


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"null", b'{"model": 3, "prompt": 7}', b"[" * 9999])
def test_any_body_has_a_way(body: bytes) -> None:
    assert wanted_of("POST", "/v1/completions", body, "m", has_jobs=True).kind == ""


def test_what_only_the_owner_answers() -> None:
    asked = [
        ("POST", "/v1/files"),
        ("GET", "/v1/fine_tuning/jobs/x"),
        ("DELETE", "/v1/models/ft:m:s"),
        ("GET", "/page/facts"),
    ]
    assert {wanted_of(method, path, b"", "m", has_jobs=True).kind for method, path in asked} == {JOBS}
    assert {wanted_of(method, path, b"", "m", has_jobs=False).kind for method, path in asked} == {""}
    assert wanted_of("GET", "/v1/models", b"", "m", has_jobs=True).kind == ""

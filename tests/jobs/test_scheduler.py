"""Fairness against the definition: tokens that each job had, over any schedule of steps, joins and leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flextron.jobs.scheduler import FairShare

sizes = st.lists(st.integers(1, 500), min_size=2, max_size=8)


def serve(fair_share: FairShare, sizes: dict[str, int], num_turns: int) -> dict[str, int]:
    had = dict.fromkeys(sizes, 0)
    for _ in range(num_turns):
        job = fair_share.next()
        assert job is not None
        fair_share.charge(job, sizes[job])
        had[job] += sizes[job]
    return had


@given(sizes, st.integers(1, 200))
def test_no_two_jobs_ever_differ_by_more_than_the_largest_step(sizes: list[int], num_turns: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    fair_share = FairShare()
    fair_share.keep(named)
    had = serve(fair_share, named, num_turns).values()
    assert max(had) - min(had) <= max(sizes)


@given(sizes, st.integers(0, 300))
def test_who_joins_later_neither_catches_up_nor_waits(sizes: list[int], before: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    late = str(len(sizes) - 1)
    fair_share = FairShare()
    fair_share.keep(named.keys() - {late})
    serve(fair_share, {k: v for k, v in named.items() if k != late}, before)
    fair_share.keep(named)
    had = serve(fair_share, named, 100)
    assert abs(had[late] - min(n for k, n in had.items() if k != late)) <= 2 * max(sizes)


def test_who_left_is_forgotten_and_nobody_has_no_turn() -> None:
    fair_share = FairShare()
    assert fair_share.next() is None
    fair_share.keep(["a", "b"])
    fair_share.charge("a", 5)
    fair_share.keep(["a"])
    assert fair_share.next() == "a"
    fair_share.keep([])
    assert fair_share.next() is None


def test_a_step_without_tokens_is_a_turn() -> None:
    fair_share = FairShare()
    fair_share.keep(["a", "b"])
    fair_share.charge("a", 0)
    assert fair_share.next() == "b"

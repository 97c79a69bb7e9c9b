"""The pool of blocks under random use, against sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flextron.engine.pages import Page, PagePool, page_key

actions = st.lists(
    st.tuples(st.sampled_from(["allocate", "release", "publish", "share"]), st.integers(0, 12)), max_size=60
)


@given(actions)
def test_no_unit_is_lost_or_given_twice(actions: list[tuple[str, int]]) -> None:
    pool = PagePool(24)
    held: list[Page] = []
    for action, number in actions:
        if action == "allocate":
            available = pool.num_available
            page = pool.allocate(number)
            assert (page is not None) == (number <= available)
            if page is not None:
                held.append(page)
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "publish" and held:
            pool.publish(held[number % len(held)], page_key(b"", [number]))
        elif action == "share":
            page = pool.share(page_key(b"", [number]))
            if page is not None:
                assert page.key == page_key(b"", [number])
                held.append(page)
        pool.check_integrity(held)
        assert pool.num_used == len({u for page in held for u in page.blocks})
    for page in held:
        pool.release(page)
    pool.forget()
    assert pool.num_used == 0
    assert pool.num_available == 24
    pool.check_integrity([])


def test_a_page_is_found_until_its_units_are_needed() -> None:
    pool = PagePool(4)
    page = pool.allocate(3)
    assert page is not None
    pool.publish(page, b"key")
    pool.release(page)
    assert pool.share(b"key") is page
    pool.release(page)
    assert pool.allocate(2) is not None
    assert pool.share(b"key") is None


def test_keys_name_all_tokens_before() -> None:
    first, other = page_key(b"net", [1, 2]), page_key(b"net", [1, 3])
    assert page_key(first, [4]) != page_key(other, [4])
    assert page_key(b"net", [1, 2]) == first != page_key(b"other", [1, 2])

"""Where a request goes: to a replica that holds its pages or its adapter, unless others have much less to do.

A request's *beginning* is its text in blocks, each hashed with all before it, under the model's name and target: the
KV cache's pages are those of one sub-network and one adapter. Replicas that got a request with the same beginning
hold its pages. A holder is preferred within a bound on its load, so one hot adapter or prompt spreads over as many
replicas as it needs. Where nobody holds anything, the less loaded of two drawn at random is taken.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["JOBS", "Routes", "State", "Wanted", "bound", "wanted_of"]

JOBS = "jobs"
_BLOCK = 256
"""Characters of a block: some pages of tokens."""
_MOST_BLOCKS = 64
_MOST_KNOWN = 100_000
"""Beginnings that are remembered."""
_MOST_HOLDERS = 8
_SLACK, _SHARE = 4, 1.25
"""A holder may have so many requests more than the least loaded replica, or this multiple."""
_JOB_PATHS = ("/v1/files", "/v1/fine_tuning", "/page/facts")
_TEXTS = ("system", "instructions", "tools", "messages", "input", "prompt")
"""Keys of bodies in the order in which they become a prompt."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a replica should have for a request."""

    kind: str = ""
    """`jobs` for what only the owner of the state directory answers."""
    model: str = ""
    """Name of the model, adapter or target; empty for the model as it is."""
    beginnings: tuple[int, ...] = ()
    """Hashes of growing beginnings."""


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a replica."""

    load: int = 0
    """Requests that it has not answered."""
    adapters: frozenset[str] = frozenset()
    """Names of those that it has in memory."""
    owns_jobs: bool = False


def bound(least: int) -> float:
    """The most load of a holder that is preferred to a replica with the least load."""
    return max(least + _SLACK, _SHARE * least)


class Routes:
    """Remembers who got which beginning."""

    def __init__(self, seed: int | None = None) -> None:
        """Nobody holds anything."""
        self._known: OrderedDict[int | str, list[str]] = OrderedDict()
        self._draw = random.Random(seed)

    def order(self, wanted: Wanted, states: Mapping[str, State]) -> list[str]:
        """All replicas, the best one first, which is taken to get the request.

        Args:
            wanted: what the request needs.
            states: replicas by their ids; there is at least one.
        """
        if wanted.kind == JOBS:
            return sorted(states, key=lambda r: (not states[r].owns_jobs, states[r].load))
        rest = list(states)
        self._draw.shuffle(rest)
        chosen = self._holder(wanted, states) or min(rest[:2], key=lambda r: states[r].load)
        self._remember(wanted, chosen)
        rest.remove(chosen)
        return [chosen, *sorted(rest, key=lambda r: states[r].load)]

    def _holder(self, wanted: Wanted, states: Mapping[str, State]) -> str | None:
        """The least loaded of those that hold the longest beginning, then the adapter, if it is not too loaded."""
        most = bound(min(state.load for state in states.values()))

        def best(holders: Collection[str]) -> str | None:
            good = [r for r in holders if r in states and states[r].load <= most]
            return min(good, key=lambda r: states[r].load) if good else None

        for key in reversed(wanted.beginnings):
            if (found := best(self._known.get(key, ()))) is not None:
                return found
        if not wanted.model:
            return None
        name = wanted.model.partition("@")[0]
        loaded = {r for r, state in states.items() if name in state.adapters}
        return best(self._known.get(wanted.model, ())) or best(loaded)

    def _remember(self, wanted: Wanted, replica: str) -> None:
        keys: list[int | str] = [*wanted.beginnings]
        if wanted.model:
            keys.append(wanted.model)
        for key in keys:
            holders = [replica, *(r for r in self._known.pop(key, ()) if r != replica)]
            self._known[key] = holders[:_MOST_HOLDERS]
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)


def wanted_of(method: str, path: str, body: bytes, name: str, *, has_jobs: bool) -> Wanted:
    """What a request needs.

    Args:
        method: its method.
        path: its path.
        body: its body.
        name: name of the model that all serve.
        has_jobs: whether finetuning is offered.
    """
    if has_jobs and (path.startswith(_JOB_PATHS) or method == "DELETE"):
        return Wanted(JOBS)
    try:
        data = json.loads(body) if body else None
    except (ValueError, RecursionError):
        data = None  # the replica says what is wrong
    if not isinstance(data, dict):
        return Wanted()
    asked = data.get("flextron")
    target = json.dumps(asked, sort_keys=True) if asked else ""
    model = f"{data.get('model', '')}"[:300]
    return Wanted("", "" if model == name and not target else model + target, _beginnings(model + target, data))


def _beginnings(root: str, data: Mapping[str, Any]) -> tuple[int, ...]:
    text = "".join(json.dumps(data[key], ensure_ascii=False) for key in _TEXTS if data.get(key))
    raw, found = text.encode(errors="replace"), list[int]()
    state = hashlib.blake2b(root.encode(errors="replace"), digest_size=8)
    for at in range(0, min(len(raw) - _BLOCK + 1, _BLOCK * _MOST_BLOCKS), _BLOCK):
        state.update(raw[at : at + _BLOCK])
        found.append(int.from_bytes(state.digest(), "big"))
    return tuple(found)

"""Random damage to files, in entries of JSON documents or in bytes, and a watch over what reading them costs."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flextron.errors import FlextronError

LONGEST_SECONDS = 2.0
LARGEST_BYTES = 1_000_000_000

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "1", "null", "\ud800", "../x", "/etc/passwd", "a" * 10_000),
    *(-1, 0, 1, 2, 3, 7, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, -(2**63), 10**400, 100_000, 10**9),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 1e-308, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [None], [0], ["x"], [1, "1", None], {"": 0}, {"a": 1}, {"(": 1}, {"1": 1.0}, [[[[[[]]]]]]),
    *([0] * 5000, {str(i): i for i in range(2000)}, {"(([a-z._0-9])+)+X": 1}, {"default": {}}, [{}], [{"a": []}]),
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a document, the document itself left out."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting and len(found) < 5000:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            found.append((node, key))
            waiting.append(value)
    return found


def damaged(rng: random.Random, document: Any) -> Any:
    """The document with one to three changes."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.02:
            return copy.deepcopy(rng.choice(VALUES))
        if not (spots := places(document)):
            return document
        _change(rng, *rng.choice(spots), spots)
    return document


def _change(rng: random.Random, node: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
    action = rng.choice(("value", "value", "value", "drop", "copy", "wrap", "number", "rename", "repeat"))
    value = node[key]
    if action == "drop":
        del node[key]
    elif action == "copy":
        other, at = rng.choice(spots)
        if at in other if isinstance(other, dict) else at < len(other):
            node[key] = copy.deepcopy(other[at])
    elif action == "wrap":
        node[key] = rng.choice(([value], {"a": value}, str(value)))
    elif action == "number" and type(value) in (int, float) and abs(value) < 1e300:
        node[key] = rng.choice((value + 1, value - 1, -value, value * 2, value / 2, float(value), value * 1000))
    elif action == "rename" and isinstance(node, dict):
        node[rng.choice(("x", str(key) + "s", "type", ""))] = node.pop(key)
    elif action == "repeat" and isinstance(value, list):
        node[key] = value * rng.choice((2, 100))
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """The content with a few bytes changed, left out, put in or cut off; the beginning is hit more than the rest."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(max(1, min(len(out), rng.choice((64, 1024, len(content))))))
        action = rng.choice(("flip", "set", "cut", "drop", "insert", "zeros", "deep"))
        if action == "flip" and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == "set":
            out[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"9999", rng.randbytes(4))
            )
        elif action == "cut":
            del out[rng.choice((at, len(out) - 1)) :]
        elif action == "drop":
            del out[at : at + rng.choice((1, 2, 50))]
        elif action == "insert":
            out[at:at] = rng.choice((b"\0", b"{", b"]", b'"', b"\xff", b"1" * 5000, b"\xed\xa0\x80", rng.randbytes(8)))
        elif action == "zeros":
            out[at : at + 100] = bytes(len(out[at : at + 100]))
        elif rng.random() < 0.2:
            out[at:at] = b"[" * 100_000
    return bytes(out)


def written(document: Any) -> bytes:
    """As JSON; numbers that no JSON has are written as Python does."""
    return json.dumps(document).encode()


@dataclass
class Watch:
    """What came of reading damaged inputs."""

    counts: dict[str, list[int]] = field(default_factory=dict)
    """By format: inputs in all, and those that were refused."""
    faults: list[str] = field(default_factory=list)

    def read(self, name: str, reader: Callable[[Any], object], source: Any, shown: Any) -> None:
        """Read a source; only success and `FlextronError` are right, in time. `shown` tells of the damage."""
        count = self.counts.setdefault(name, [0, 0])
        count[0] += 1
        # the processor's time as well: the machine may be busy with other work
        start, cpu = time.perf_counter(), time.process_time()
        try:
            reader(source)
        except FlextronError as error:
            count[1] += 1
            if "\n" in str(error).strip() or len(str(error)) > 1500:
                self._add(name, f"no one sentence: {str(error)[:300]!r}", shown)
            try:
                str(error).encode()
            except UnicodeEncodeError:
                self._add(name, "a message that no terminal takes", shown)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.format_exc().strip().splitlines()[-4:]
            self._add(name, f"{type(error).__name__}: {str(error)[:200]} | {' | '.join(where)}", shown)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        if cpu > LONGEST_SECONDS or seconds > 10 * LONGEST_SECONDS:
            self._add(name, f"took {seconds:.1f} s", shown)

    def _add(self, name: str, fault: str, shown: Any) -> None:
        if len(self.faults) < 200:
            self.faults.append(f"{name}: {fault} | input {repr(shown)[:400]}")


@contextmanager
def little_memory() -> Iterator[None]:
    """No single allocation can be absurd inside, and what the process has grown by at the end is bounded."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LARGEST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LARGEST_BYTES, f"reading took {grown / 1e9:.1f} GB"

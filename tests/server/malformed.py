"""Bodies that are wrong in every way we could think of, most of them almost right."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

__all__ = ["bodies"]

_NUMBERS = [0, -1, 1, 2, 10**3, 10**30, -(10**30), 10**400, 2**63, 2**64, 1.5, -0.5, 1e-320, 1e308]
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\x00", "\ud800", "a" * 3000, "tiny", "token", "🙂"]),
)
_ANY = st.recursive(
    _VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_TARGETS = st.dictionaries(
    st.sampled_from(
        [
            *("latency", "latency_ms", "params", "memory_gb", "max_loss_increase"),
            *("context", "router", "min_latency_target", "x"),
        ]
    ),
    _VALUES,
    max_size=3,
)
_KEYS = {
    "model": st.sampled_from(["tiny@0.6", "tiny@", "tiny@9" * 50, "other"]) | _ANY,
    "prompt": st.lists(st.integers(-1, 600), max_size=5) | st.lists(st.text(max_size=3), max_size=3) | _ANY,
    "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": _ANY}), max_size=2) | _ANY,
    "flextron": _TARGETS | _ANY,
    "stream_options": st.just({"include_usage": True}) | _ANY,
    "logit_bias": _ANY,
    "response_format": _ANY,
} | dict.fromkeys(
    (
        *("stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n", "best_of", "stop"),
        *("echo", "logprobs", "top_logprobs", "suffix", "presence_penalty", "tools", "user", "unknown"),
    ),
    _ANY,
)


def _encoded(body: dict[str, Any]) -> bytes:
    # NaN and Infinity as Python writes them, lone surrogates as escapes
    return json.dumps(body).encode()


@st.composite
def _almost_right(draw: st.DrawFn) -> bytes:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    body["max_tokens"] = 2
    for key in draw(st.lists(st.sampled_from(sorted(_KEYS)), min_size=1, max_size=3, unique=True)):
        body[key] = draw(_KEYS[key])
    for key in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
        del body[key]
    return _encoded(body)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    body = draw(_almost_right())
    at = draw(st.integers(0, len(body)))
    return body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 3)) :]


_ODD = st.sampled_from(
    [
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"{",
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "unknown": -Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "tiny", "messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"model": "tiny", "prompt": "a", "prompt": 3}',
    ]
)

bodies = st.one_of(_almost_right(), _almost_right(), _damaged(), _ODD, st.binary(max_size=40))

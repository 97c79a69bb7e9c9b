"""Server-sent events, cut as networks cut them."""

from __future__ import annotations

import pytest

from flextron.bench.sse import EventStream


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_whole_however_the_network_cuts_them(size: int) -> None:
    data = ': ping\r\n\r\ndata: {"a": "\u2028x"}\r\n\r\nevent: x\ndata:1\ndata: 2\n\ndata: [DONE]\n\ndata: cut'.encode()
    stream = EventStream()
    events = [event for i in range(0, len(data), size) for event in stream.feed(data[i : i + size])]
    assert events == ['{"a": "\u2028x"}'.encode(), b"1\n2", b"[DONE]"]

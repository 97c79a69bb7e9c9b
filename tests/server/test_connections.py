"""Clients that are slow, stop half way, or do not speak HTTP: they are let go, and others notice nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from flextron import ElasticModel
from tests.server.running import Running, running

BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
LINE = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEAD = LINE + b"Content-Length: %d\r\n\r\n" % len(BODY)
SECONDS = 0.5


@pytest.fixture(scope="module")
def impatient(model: ElasticModel) -> Iterator[Running]:
    with running(model, client_seconds=SECONDS) as made:
        yield made
        made.wait_until_idle()
        assert made.client().completions.create(model="tiny", prompt="a", max_tokens=2).choices


def connect(server: Running) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    sock.settimeout(10)
    return sock


def drip(sock: socket.socket, data: bytes) -> None:
    """Byte by byte, until the other side has enough."""
    for i in range(len(data)):
        try:
            sock.sendall(data[i : i + 1])
        except OSError:
            return
        time.sleep(0.05)


def rest(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    try:
        while data := sock.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def assert_answer(data: bytes, status: int, code: str | None) -> None:
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), data
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_closes_its_side_gets_its_answer(impatient: Running, version: bytes) -> None:
    """As `nc -N` does, or a proxy that knows that it has nothing more to send."""
    for stream in (False, True):
        body = json.dumps({**json.loads(BODY), "stream": stream}).encode()
        head = LINE.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body)
        with connect(impatient) as sock:
            sock.sendall(head + body)
            sock.shutdown(socket.SHUT_WR)
            answer = rest(sock)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert (b"data: [DONE]" if stream else b'"finish_reason":') in answer
    with connect(impatient) as sock:
        sock.sendall(b"GET /health HTTP/%s\r\nHost: localhost\r\n\r\n" % version)
        sock.shutdown(socket.SHUT_WR)
        assert rest(sock).startswith(b"HTTP/1.1 200 ")


def test_nothing_is_sent(impatient: Running) -> None:
    with connect(impatient) as sock:
        assert_answer(rest(sock), 408, "request_timeout")


def test_headers_byte_by_byte(impatient: Running) -> None:
    with connect(impatient) as sock:
        begun = time.monotonic()
        drip(sock, LINE + b"X-Long: " + b"a" * 1000)
        assert time.monotonic() - begun < 5
        # the system may have dropped the answer when bytes arrived after the close
        if data := rest(sock):
            assert_answer(data, 408, "request_timeout")


def test_a_body_byte_by_byte(impatient: Running) -> None:
    with connect(impatient) as sock:
        begun = time.monotonic()
        sock.sendall(LINE + b"Content-Length: 1000\r\n\r\n")
        drip(sock, b"{" + b" " * 200)
        assert time.monotonic() - begun < 5
        if data := rest(sock):
            assert_answer(data, 408, "request_timeout")


def test_a_body_that_stops(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.sendall(HEAD + BODY[:-1])
        assert_answer(rest(sock), 408, "request_timeout")


def test_a_second_request_that_does_not_end(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.sendall(HEAD + BODY)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(LINE)
        assert rest(sock).count(b"HTTP/1.1 408 ") == 1


@pytest.mark.parametrize("sent", [b"", LINE, HEAD, HEAD + BODY[:5]])
def test_half_closed(impatient: Running, sent: bytes) -> None:
    with connect(impatient) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        # at once: after `SECONDS` there would be an answer
        assert rest(sock) == b""
    impatient.wait_until_idle()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\x00" * 70_000])
def test_no_http(impatient: Running, sent: bytes) -> None:
    with connect(impatient) as sock:
        sock.sendall(sent)
        data = rest(sock)
        # the system may drop the answer while so much arrives
        assert data or len(sent) > 65536
        if data:
            assert_answer(data, 400, None)


def test_a_chunk_that_is_none(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.sendall(LINE + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n")
        assert_answer(rest(sock), 400, None)


def test_answers_that_nobody_reads(impatient: Running) -> None:
    with connect(impatient) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # far more in answers than the system keeps for a client that does not read
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        drip(sock, b" " * 300)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            sock.sendall(b" ")


def test_many_who_only_connect(impatient: Running) -> None:
    socks = [connect(impatient) for _ in range(100)]
    try:
        assert impatient.client().completions.create(model="tiny", prompt="a", max_tokens=2).choices
        assert all(rest(sock) for sock in socks)
    finally:
        for sock in socks:
            sock.close()

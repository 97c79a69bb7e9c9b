"""Forms against the encoder of `httpx`, and cut or random ones."""

from __future__ import annotations

import contextlib
import email.parser
import email.policy

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.server.multipart import boundary_of, parse_parts
from flextron.serving.errors import ApiError

names = st.text(st.characters(codec="utf-8", exclude_characters='\r\n"\\%', exclude_categories=("Cc",)), min_size=1)


def encoded(files: list[tuple[str, tuple[str, bytes]]], data: dict[str, str]) -> tuple[bytes, bytes]:
    request = httpx.Request("POST", "http://a", files=files, data=data)
    return request.read(), boundary_of(request.headers["content-type"])


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.tuples(names, st.binary())), min_size=1, max_size=4
    ),
    st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text(), max_size=3),
)
def test_what_httpx_writes_is_read(files: list[tuple[str, tuple[str, bytes]]], data: dict[str, str]) -> None:
    body, boundary = encoded(files, data)
    found = [(p.name, p.filename, body[p.start : p.end]) for p in parse_parts(body, boundary)]
    expected = [(name, None, value.encode()) for name, value in data.items()]
    assert found == [*expected, *((name, file.strip(), content) for name, (file, content) in files)]


def test_as_the_standard_library_reads_it() -> None:
    body, boundary = encoded([("file", ("a b.jsonl", b"line\r\nline\r\n\r\n"))], {"purpose": "fine-tune"})
    head = b"Content-Type: multipart/form-data; boundary=" + boundary + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    expected = [(p.get_param("name", header="content-disposition"), p.get_filename()) for p in message.iter_parts()]
    assert [(p.name, p.filename) for p in parse_parts(body, boundary)] == expected


def test_a_preamble_and_spaces_are_passed_over() -> None:
    body = b'hello\r\n--x \t\r\nContent-Type: a/b\r\ncontent-disposition: form-data; name="n"\r\n\r\nv\r\n--x--\r\nbye'
    (part,) = parse_parts(body, b"x")
    assert (part.name, part.filename, body[part.start : part.end]) == ("n", None, b"v")


@given(st.integers(0, 200))
def test_a_form_that_is_cut_is_refused(length: int) -> None:
    body, boundary = encoded([("file", ("a", b"b" * 20))], {})
    whole = len(body) - len(b"--\r\n")
    with pytest.raises(ApiError, match="malformed"):
        parse_parts(body[: min(length, whole)], boundary)


@given(
    st.lists(
        st.sampled_from([b"--x", b"--x--", b"\r\n", b"\r\n\r\n", b"name", b"Content-Disposition: form-data;", b"a"])
    )
)
def test_no_form_is_too_strange(pieces: list[bytes]) -> None:
    body, parts = b"".join(pieces), []
    with contextlib.suppress(ApiError):
        parts = parse_parts(body, b"x")
    # each lies between two boundaries
    for part in parts:
        assert b"--x" in body[: part.start]
        assert body[part.end :].startswith(b"\r\n--x")


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=a", "é; ="])
def test_what_is_no_form(kind: str) -> None:
    with pytest.raises(ApiError, match="send the file as"):
        boundary_of(kind)


def test_forms_of_too_much() -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
    with pytest.raises(ApiError, match="more than 32 parts"):
        parse_parts(part * 40 + b"--x--", b"x")
    with pytest.raises(ApiError, match="too long"):
        parse_parts(part.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 9000 + b"\r\n\r\n") + b"--x--", b"x")

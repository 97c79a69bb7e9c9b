"""`multipart/form-data`: where in a body which field lies (RFC 7578)."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message
from mmap import mmap

from flextron.serving.errors import ApiError, bad_request

__all__ = ["Part", "boundary_of", "parse_parts"]

_MOST_PARTS = 32
_MOST_HEADER_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form."""

    name: str
    filename: str | None
    """The file's name; None for a field that is no file."""
    start: int
    """Position in the body, in bytes."""
    end: int


def boundary_of(content_type: str) -> bytes:
    """What stands between the parts.

    Raises:
        ApiError: the body is no form.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary or not boundary.isascii():
        raise bad_request("send the file as multipart/form-data, with a boundary")
    return boundary.encode()


def parse_parts(body: bytes | mmap, boundary: bytes) -> list[Part]:
    """The parts of a body.

    Raises:
        ApiError: it is malformed, or ends early.
    """
    delimiter = b"\r\n--" + boundary
    parts: list[Part] = []
    # the first may stand at the very beginning, without a line before it
    begins = body[: len(delimiter) - 2] == delimiter[2:]
    at = len(delimiter) - 2 if begins else _after(body, delimiter, 0)
    while body[at : at + 2] != b"--":
        if len(parts) == _MOST_PARTS:
            raise _malformed(f"it has more than {_MOST_PARTS} parts")
        headers_at = _after(body, b"\r\n", at)
        if body[at : headers_at - 2].strip(b" \t"):
            raise _malformed("something follows a boundary in its line")
        start = _after(body, b"\r\n\r\n", headers_at)
        if start - headers_at > _MOST_HEADER_BYTES:
            raise _malformed("the headers of a part are too long")
        at = _after(body, delimiter, start)
        parts.append(_part(body[headers_at : start - 4], start, at - len(delimiter)))
    return parts


def _after(body: bytes | mmap, wanted: bytes, at: int) -> int:
    found = body.find(wanted, at)
    if found < 0:
        raise _malformed("it ends early")
    return found + len(wanted)


def _part(headers: bytes, start: int, end: int) -> Part:
    disposition = Message()
    for line in headers.decode(errors="replace").split("\r\n"):
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            disposition["content-disposition"] = value.strip()
    name = disposition.get_param("name", header="content-disposition")
    if disposition.get_content_disposition() != "form-data" or not isinstance(name, str):
        raise _malformed("a part has no name")
    return Part(name, disposition.get_filename(), start, end)


def _malformed(reason: str) -> ApiError:
    return bad_request(f"the form is malformed: {reason}")

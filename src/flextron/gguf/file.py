"""The GGUF format: metadata and views of tensors, from a file that may be damaged or made to harm.

Nothing is believed before it is checked against the file's size: counts, lengths and shapes cost no more memory than
the file has bytes, some small factor aside. What llama.cpp's reader refuses is refused here: names that occur twice,
tensors that do not follow each other without gaps, rows that are no whole number of quantised blocks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flextron.errors import FlextronError, shown

__all__ = ["GgufTensor", "read_file"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
"""NumPy's types of the format's numbers."""
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MOST_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"


class _DamageError(Exception):
    """What is wrong with the bytes; `read_file` adds the file and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """A tensor of a file that is mapped into memory."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    """Outermost dimension first; the file lists them the other way round."""
    data: np.ndarray[Any, Any]
    """Its bytes, (..., bytes of a row)."""

    def values(self) -> np.ndarray[Any, Any]:
        """Numbers, dequantised to float32; possibly a read-only view of the file.

        Raises:
            FlextronError: the `gguf` package cannot dequantise its kind.
        """
        try:
            return gguf.quants.dequantize(self.data, self.kind)
        except NotImplementedError as error:
            raise FlextronError(
                f"the GGUF file holds {shown(self.name)} as {self.kind.name}, which cannot be read; requantise it"
            ) from error


class _Cursor:
    """Reads the header from its beginning to its end; never beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        """Step over bytes; where they begin."""
        start = self.at
        if count > len(self.data) - start:
            raise _DamageError(f"it ends at byte {len(self.data)}, in the middle of its header")
        self.at = start + count
        return start

    def number(self, kind: str) -> int:
        """One unsigned integer, by `struct`'s letter."""
        size = struct.calcsize(kind)
        return int(struct.unpack_from(f"<{kind}", self.data, self.take(size))[0])

    def text(self) -> str:
        """A string with its length before it."""
        length = _LENGTH.unpack_from(self.data, self.take(8))[0]
        start = self.take(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise _DamageError("a text in its header is not UTF-8") from error

    def value(self) -> Any:
        """A value of the metadata: a text, a number, or a list or array of them."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0].item()
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            if count * 8 > len(self.data) - self.at:
                raise _DamageError(f"it ends before the {count} texts of a list")
            return [self.text() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            raise _DamageError(f"its header has a value of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize)
        # a copy: views would keep the file mapped
        values: np.ndarray[Any, Any] = np.frombuffer(self.data, dtype, count, start).copy()
        return values


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the header says of a tensor."""

    name: str
    dims: list[int]
    """Innermost first."""
    kind: int
    offset: int


def read_file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    """Metadata and tensors by name.

    Numbers come as Python's, arrays of them as NumPy's, lists of texts as lists.

    Raises:
        FlextronError: the file is missing, not GGUF, of the other byte order or an unknown version, or damaged.
    """
    if not path.is_file():
        raise FlextronError(f"{path} is not a file; give the path of a .gguf file")
    with path.open("rb") as stream:
        start = stream.read(8)
        if start[:4] != _MAGIC:
            raise FlextronError(f"{path} is not a GGUF file; give one, or a Hugging Face directory")
        if len(start) < 8:
            raise FlextronError(f"{path} is cut short or damaged; download or convert it again (it has no version)")
        _check_version(path, start[4:])
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(data)
    except _DamageError as error:
        raise FlextronError(f"{path} is cut short or damaged; download or convert it again ({error})") from error


def _check_version(path: Path, raw: bytes) -> None:
    little, big = (int.from_bytes(raw, order) for order in ("little", "big"))
    if little & 0xFFFF == 0 and big in _VERSIONS:
        raise FlextronError(
            f"{path} is big-endian, and only little-endian GGUF files are read; "
            "convert it with `gguf-convert-endian FILE little`"
        )
    if little not in _VERSIONS:
        raise FlextronError(f"{path} is of GGUF version {little}, and only {_VERSIONS} are read; convert it again")


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data)
    cursor.take(8)
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in metadata:
            raise _DamageError(f"{shown(key)} occurs twice")
        metadata[key] = cursor.value()
    entries = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamageError(f"{_ALIGNMENT} is {shown(alignment)}, no power of two")
    return metadata, _tensors(data, entries, cursor.at, alignment)


def _entry(cursor: _Cursor) -> _Entry:
    name, num_dims = cursor.text(), cursor.number("I")
    if not 1 <= num_dims <= _MOST_DIMENSIONS:
        raise _DamageError(f"tensor {shown(name)} has {num_dims} dimensions")
    dims = [cursor.number("Q") for _ in range(num_dims)]
    return _Entry(name, dims, cursor.number("I"), cursor.number("Q"))


def _tensors(data: mmap.mmap, entries: list[_Entry], header: int, alignment: int) -> dict[str, GgufTensor]:
    def aligned(size: int) -> int:
        return -(-size // alignment) * alignment

    start, offset = aligned(header), 0
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        name = shown(entry.name)
        if entry.name in tensors:
            raise _DamageError(f"tensor {name} occurs twice")
        if entry.offset != offset:
            raise _DamageError(f"tensor {name} begins at {entry.offset} where the one before ends at {offset}")
        kind, row_bytes = _layout(entry)
        num_bytes = math.prod(entry.dims[1:]) * row_bytes
        if start + offset + num_bytes > len(data):
            raise _DamageError(f"it ends in the middle of tensor {name}")
        shape = tuple(reversed(entry.dims))
        raw = np.frombuffer(data, np.uint8, num_bytes, start + offset).reshape(*shape[:-1], row_bytes)
        tensors[entry.name] = GgufTensor(name=entry.name, kind=kind, shape=shape, data=raw)
        offset = aligned(offset + num_bytes)
    return tensors


def _layout(entry: _Entry) -> tuple[gguf.GGMLQuantizationType, int]:
    """Kind, and bytes of a row."""
    try:
        kind = gguf.GGMLQuantizationType(entry.kind)
    except ValueError:
        raise _DamageError(f"tensor {shown(entry.name)} is of the unknown type {entry.kind}") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if min(entry.dims) < 1 or entry.dims[0] % block:
        raise _DamageError(f"tensor {shown(entry.name)} cannot have the shape {entry.dims} as {kind.name}")
    return kind, entry.dims[0] // block * size

"""Damaged GGUF files without end: bytes changed at random, and well-formed files whose contents make no sense.

A file is written by its description alone, in any types, because damage is what the `gguf` package would not write.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from tests.checkpoints.families_cases import CASES, random_from
from tests.gguf.writing import fields_of, to_gguf
from tests.tokenizers_zoo import gguf_metadata, zoo_tokenizer

__all__ = ["BASES", "Content", "base", "damaged", "encoded"]

BASES = {"llama": ("llama", "llama-2"), "llama-3": ("llama", "llama-3"), "qwen3": ("qwen3", "qwen3"),
         "gpt2": ("gpt2", "gpt2"), "neox": ("gptneox", "neox")}  # fmt: skip
"""Cases of models, with the architecture and the kind of tokenizer."""
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_EXTREMES = [0, 1, 2, 3, 7, 255, 2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
_ODD: list[Any] = [
    *(-1, 0, 1, 3, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1, 1.5, 0.0, -0.0, 1e308, float("nan")),
    *(float("inf"), True, False, "", "x", "linear", "yarn", "gpt2", "llama", "none", "\N{REPLACEMENT CHARACTER}\0"),
    *([], [0], [1, 2, 3], ["a"], [""], ["a", "a"], [1.5], [2**63], [True], "a" * 5000, ["x" * 5000]),
]


@dataclass
class Content:
    """What a file holds."""

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    kinds: dict[str, int] = field(default_factory=dict)
    """Types of tensors other than float32."""
    dims: dict[str, list[int]] = field(default_factory=dict)
    """Dimensions that are not the array's."""
    offsets: dict[str, int] = field(default_factory=dict)
    """Where tensors are said to begin, if not where they do."""


def base(case: str) -> Content:
    """A sound file with a tokenizer."""
    arch, kind = BASES[case]
    size = len(zoo_tokenizer(kind))
    config = type(CASES[case])(**CASES[case].to_dict() | {"vocab_size": size})
    named = {name: p.detach() for name, p in random_from(config).named_parameters()}
    fields = {f"{arch}.{key}": value for key, value in fields_of(config).items()}
    return Content({"general.architecture": arch} | fields | gguf_metadata(kind), to_gguf(named, config))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> int:
    """The type that a value is written in."""
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 2**32 else 10 if value >= 0 else 11
    return 8 if isinstance(value, str) else 12 if isinstance(value, float) and abs(value) > 1e30 else 6


def _value(value: Any) -> bytes:
    if not isinstance(value, list):
        kind = _kind(value)
        return struct.pack("<I", kind) + (_text(value) if kind == 8 else struct.pack("<" + _LETTERS[kind], value))
    kind = max((_kind(v) for v in value), default=4)
    if kind == 11 and any(isinstance(v, int) and v >= 2**63 for v in value):  # no integer type holds both ends
        kind = 12
    head = struct.pack("<IIQ", 9, kind, len(value))
    if kind == 8:
        return head + b"".join(_text(str(v)) for v in value)
    return head + struct.pack(f"<{len(value)}{_LETTERS[kind]}", *value)


def encoded(content: Content) -> bytes:
    """The file."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(content.tensors), len(content.fields))]
    head += [_text(key) + _value(value) for key, value in content.fields.items()]
    offset, data = 0, []
    for name, array in content.tensors.items():
        dims = content.dims.get(name, list(reversed(array.shape)))
        place = content.offsets.get(name, offset)
        kind = content.kinds.get(name, 0)
        head.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, place))
        raw = array.tobytes() + b"\0" * (-array.nbytes % 32)
        data.append(raw)
        offset += len(raw)
    start = b"".join(head)
    return start + b"\0" * (-len(start) % 32) + b"".join(data)


def _change_key(content: Content, draw: random.Random) -> None:
    content.fields[draw.choice(list(content.fields))] = draw.choice(_ODD)


def _drop_key(content: Content, draw: random.Random) -> None:
    del content.fields[draw.choice(list(content.fields))]


def _add_key(content: Content, draw: random.Random) -> None:
    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.Tokenizer, gguf.Keys.Split)
    templates = [v for k, v in vars(draw.choice(groups)).items() if k.isupper()]
    arch = content.fields.get("general.architecture", "llama")
    key = draw.choice(templates).replace("{arch}", str(arch)).replace("{name}", "x")
    content.fields[key] = draw.choice(_ODD)


def _change_list(content: Content, draw: random.Random) -> None:
    lists = [v for v in content.fields.values() if isinstance(v, list) and v]
    if not lists:
        return
    values = draw.choice(lists)
    i, j = draw.randrange(len(values)), draw.randrange(len(values))
    act = draw.randrange(5)
    if act == 0:
        values[i] = values[j]
    elif act == 1:
        del values[i:]
    elif act == 2:
        del values[i]
    elif act == 3:
        values.append(values[j])
    else:
        same = [v for v in _ODD if isinstance(v, type(values[i])) and not isinstance(v, bool)] or [values[j]]
        values[i] = draw.choice(same)


def _change_tensor(content: Content, draw: random.Random) -> None:
    if not content.tensors:
        return
    name = draw.choice(list(content.tensors))
    array, act = content.tensors[name], draw.randrange(7)
    if act == 0:
        del content.tensors[name]
    elif act == 1:
        content.tensors[draw.choice(["x", "blk.999999.attn_q.weight", "rope_freqs.weight", "a.bias"])] = array
    elif act == 2:
        content.kinds[name] = draw.choice([1, 2, 4, 8, 12, 16, 24, 28, 30, 41, 99, 2**31])
    elif act == 3:
        content.dims[name] = [draw.choice(_EXTREMES) for _ in range(draw.randrange(6))]
    elif act == 4:
        content.offsets[name] = draw.choice([32, 64, *_EXTREMES])
    elif act == 5:
        content.tensors[name] = array[: draw.randrange(len(array)) + 1].copy()
    else:
        array = content.tensors[name] = array.copy()
        array.reshape(-1)[draw.randrange(array.size)] = draw.choice([np.nan, np.inf, 0, 1e30, -1])


_ACTS: list[Callable[[Content, random.Random], None]] = [_change_key, _drop_key, _add_key, _change_list, _change_tensor]


def _damage_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Mostly in the header, which is the first third or so."""
    out, end = bytearray(raw), draw.choice([32, 200, len(raw) // 3, len(raw)])
    for _ in range(draw.choice([1, 1, 1, 3, 20])):
        i, act = draw.randrange(min(end, len(out))), draw.randrange(5)
        if act == 0:
            out[i] = draw.randrange(256)
        elif act == 1:
            out[i : i + 8] = struct.pack("<Q", draw.choice(_EXTREMES))
        elif act == 2:
            out[i : i + 4] = struct.pack("<I", draw.choice(_EXTREMES) % 2**32)
        elif act == 3:
            del out[i : i + draw.choice([1, 8, 64])]
        else:
            out[i:i] = draw.randbytes(draw.choice([1, 4, 8, 64]))
        if len(out) < 40:
            break
    return bytes(out[: draw.randrange(len(out))]) if draw.random() < 0.1 else bytes(out)


def damaged(bases: dict[str, Content], seed: int) -> bytes:
    """The file of a seed."""
    draw = random.Random(seed)
    content = bases[draw.choice(list(bases))]
    if draw.random() < 0.35:
        return _damage_bytes(encoded(content), draw)
    content = deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        draw.choice(_ACTS)(content, draw)
    return encoded(content)

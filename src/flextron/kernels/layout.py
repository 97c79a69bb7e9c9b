"""What Python and the C++ sources must agree on: structs, orders of names, constants. Loading a library compares them.

A struct that differs would be read beyond its end or at wrong places, which nothing else reports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal, get_args

from flextron.errors import FlextronError
from flextron.kernels.quantization import GROUP, PANEL_ROWS, QUAD
from flextron.model.adapter import TARGETS

__all__ = [
    "ACTIVATIONS",
    "LANES",
    "WEIGHTS",
    "Attention",
    "BypassPointers",
    "Ends",
    "Gradients",
    "LayerWeights",
    "Linear",
    "Norm",
    "Shape",
    "Source",
    "Tokens",
    "Weights",
    "check_layout",
    "expected_layout",
]

Source = Literal["decoder", "training"]
"""The library of the decoder's iteration, and that of the kernels for training."""
LANES = 8
"""Numbers of a vector."""
Weights = Literal["float32", "int8", "int4"]
"""Precisions of the decoder's matrices."""
WEIGHTS = get_args(Weights)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


class Norm(ctypes.Structure):
    """`Norm` in `csrc/decoder.h`."""

    _fields_ = (("weight", _Pointer), ("bias", _Pointer))


class Linear(ctypes.Structure):
    """`Linear` in `csrc/decoder.h`."""

    _fields_ = (
        *((name, _Pointer) for name in ("weight", "bias", "scales", "group_scales", "column_scales")),
        ("panel_quads", _Number),
    )


class LayerWeights(ctypes.Structure):
    """`LayerWeights` in `csrc/decoder.h`."""

    _fields_ = (
        *((name, Norm) for name in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")),
        *((name, Linear) for name in ("q", "k", "v", "o")),
        *((name, Norm) for name in ("q_norm", "k_norm")),
        *((name, Linear) for name in ("gate", "up", "down")),
        ("window", _Number),
        ("query_scale", ctypes.c_float),
    )


class Ends(ctypes.Structure):
    """`Ends` in `csrc/decoder.h`."""

    _fields_ = (
        *((name, _Pointer) for name in ("embedding", "positions")),
        ("final_norm", Norm),
        *((name, Linear) for name in ("head", "screen")),
        ("errors", _Pointer),
    )


class Shape(ctypes.Structure):
    """`Shape` in `csrc/decoder.h`."""

    _fields_ = (
        *((name, _Number) for name in ("hidden_size", "head_dim", "vocab_size", "num_layers", "rotated", "page_size")),
        *((name, _Number) for name in ("query_rows_per_group", "is_multi_query", "parallel_residual")),
        *((name, _Number) for name in ("is_layer_norm", "activation", "weights", "qk_norm_is_whole")),
        *((name, ctypes.c_float) for name in ("norm_eps", "embedding_scale", "residual_scale")),
        *((name, ctypes.c_float) for name in ("attention_cap", "logits_cap")),
    )


class BypassPointers(ctypes.Structure):
    """`Bypass` in `csrc/decoder.h`."""

    _fields_ = (
        *((name, _Pointer) for name in ("a", "b", "inputs", "outputs")),
        ("rank", _Number),
        ("scale", ctypes.c_float),
    )


class Tokens(ctypes.Structure):
    """`Tokens` in `csrc/decoder.h`."""

    _fields_ = (
        ("num_tokens", _Number),
        *((name, _Pointer) for name in ("ids", "positions", "mlp_widths", "num_groups", "block_tables", "table_rows")),
        *((name, _Pointer) for name in ("block_offsets", "cos", "sin", "adapters")),
        ("max_rank", _Number),
        ("cache", _Pointer),
        ("num_logits", _Number),
        ("rows", _Pointer),
        ("num_full", _Number),
        ("logits", _Pointer),
    )


class Attention(ctypes.Structure):
    """`Attention` in `csrc/flash_attention.h`."""

    _fields_ = (
        *((name, _Number) for name in ("num_heads", "num_kv_heads", "head_dim", "window", "num_sequences")),
        ("lengths", _Pointer),
        ("num_past", _Number),
        *((name, _Pointer) for name in "qkv"),
        *((f"{name}_stride", _Number) for name in "qkv"),
        *((name, _Pointer) for name in ("out", "lse")),
        ("threads", _Number),
    )


class Gradients(ctypes.Structure):
    """`Gradients` in `csrc/flash_attention.h`."""

    _fields_ = (("out", _Pointer), ("out_stride", _Number), *((name, _Pointer) for name in "qkv"))


def _struct(name: str, struct: type[ctypes.Structure]) -> str:
    places = [(field[0], getattr(struct, field[0])) for field in struct._fields_]
    fields = "".join(f" {field}:{place.offset}+{place.size}" for field, place in places)
    return f"struct {name} {ctypes.sizeof(struct)}{fields}"


def _enum(name: str, names: Sequence[str]) -> str:
    return f"enum {name} {len(names)}" + "".join(f" {value}:{i}" for i, value in enumerate(names))


def expected_layout(source: Source) -> list[str]:
    """One line for each struct, enum and constant; `flextron_layout` of the library returns the same lines."""
    if source == "training":
        lines = [_struct("Attention", Attention), _struct("Gradients", Gradients)]
    else:
        lines = [_struct(struct.__name__, struct) for struct in (Norm, Linear, LayerWeights, Ends, Shape, Tokens)]
        lines += [_struct("Bypass", BypassPointers)]
        lines += [_enum("Target", TARGETS), _enum("Weights", WEIGHTS), _enum("Activation", ACTIVATIONS)]
        lines += [f"constant group {GROUP}", f"constant panel_rows {PANEL_ROWS}", f"constant quad {QUAD}"]
    return [*lines, f"constant lanes {LANES}"]


def check_layout(source: Source, library: ctypes.CDLL) -> None:
    """Compare a library's layout with Python's.

    Raises:
        FlextronError: they differ, or the library does not say its own.
    """
    try:
        function = library.flextron_layout
    except AttributeError:
        found = []
    else:
        function.restype = ctypes.c_char_p
        found = function().decode().splitlines()
    expected = expected_layout(source)
    for i in range(max(len(expected), len(found))):
        ours, theirs = (lines[i] if i < len(lines) else "nothing" for lines in (expected, found))
        if ours != theirs:
            raise FlextronError(
                f"the compiled kernels of `{source}` do not fit this version of flextron: "
                f"Python expects '{ours}', they have '{theirs}'; install flextron again"
            )

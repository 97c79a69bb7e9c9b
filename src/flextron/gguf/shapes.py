"""Sizes of a GGUF file's model, and the tensors that a plain model of these sizes has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.gguf.file import GgufTensor
from flextron.gguf.keys import Metadata

__all__ = ["Sizes", "Slot", "read_sizes", "slots"]

_FUSED = ("gpt2", "gptneox")
"""Architectures with one tensor for queries, keys and values, LayerNorm and an ungated MLP."""
_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
_OPTIONAL = {
    **dict.fromkeys(("llama", "granite", "smollm3"), (*_ATTENTION, *_MLP)),
    **dict.fromkeys(("qwen3", "gemma2", "gemma3", "olmo2"), _ATTENTION),
    "gptneox": ("attn_qkv", "attn_output"),
    "stablelm": ("attn_q", "attn_k", "attn_v"),
}
"""Linear layers that may have a bias; where others of the model have one, one that is not there is 0."""
_NORMS = {
    **dict.fromkeys(("gemma2", "gemma3"), ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")),
    "olmo2": ("post_attention_norm", "post_ffw_norm"),
}
"""Norms of a layer, where they are others than those of attention and MLP."""
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of a model, by Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int


@dataclass(frozen=True, slots=True)
class Slot:
    """What one tensor must look like."""

    shape: tuple[int, ...]
    is_optional: bool = False


def read_sizes(metadata: Metadata, tensors: Mapping[str, GgufTensor]) -> Sizes:
    """Sizes that the metadata names, with as many layers as the file holds.

    Raises:
        FlextronError: one is missing, no number, or contradicts another.
        UnsupportedModelError: the model is not a plain one.
    """
    hidden, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    kv_heads = metadata.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise FlextronError(
            f"{metadata.path} has {heads} query heads and {kv_heads} key-value heads, no whole number for each; "
            "convert it again"
        )
    head_dim = metadata.count("attention.key_length", max(1, hidden // heads))
    if metadata.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{metadata.path} has keys and values of different lengths, which is not read")
    if metadata.arch in _FUSED and (kv_heads, head_dim * heads) != (heads, hidden):
        raise UnsupportedModelError(
            f"{metadata.path} is a variant of {metadata.arch} that is not supported: its {heads} heads of {head_dim} "
            f"with {kv_heads} key-value heads do not make up the hidden size {hidden}"
        )
    embedding = tensors.get("token_embd.weight")
    return Sizes(
        vocab_size=embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0,
        hidden_size=hidden,
        intermediate_size=metadata.count("feed_forward_length"),
        num_layers=_num_layers(metadata, tensors),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context=metadata.count("context_length"),
    )


def _num_layers(metadata: Metadata, tensors: Mapping[str, GgufTensor]) -> int:
    """Number of layers in the metadata, checked against the tensors in the file."""
    named, held = metadata.count("block_count"), {int(m[1]) for name in tensors if (m := _BLOCK.match(name))}
    if named != len(held):
        raise FlextronError(
            f"{metadata.path} names {named} layers ({metadata.arch}.block_count) and holds tensors of {len(held)}; "
            "convert it again"
        )
    return named


def slots(arch: str, sizes: Sizes) -> dict[str, Slot]:
    """All tensors of a plain model, by their names in the file."""
    hidden, vocab = sizes.hidden_size, sizes.vocab_size
    found = {
        "token_embd.weight": Slot((vocab, hidden)),
        "output_norm.weight": Slot((hidden,)),
        "output.weight": Slot((vocab, hidden), is_optional=True),
    }
    if arch in _FUSED or arch == "stablelm":
        found["output_norm.bias"] = Slot((hidden,))
    if arch == "gpt2":
        found["position_embd.weight"] = Slot((sizes.context, hidden))
    layer = dict(_fused_layer(arch, sizes) if arch in _FUSED else _plain_layer(arch, sizes))
    for i in range(sizes.num_layers):
        found |= {f"blk.{i}.{name}": slot for name, slot in layer.items()}
    return found


def _fused_layer(arch: str, sizes: Sizes) -> Iterator[tuple[str, Slot]]:
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    shapes = {
        "attn_qkv": (3 * hidden, hidden),
        "attn_output": (hidden, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    for name, shape in shapes.items():
        yield f"{name}.weight", Slot(shape)
        yield f"{name}.bias", Slot(shape[:1], is_optional=name in _OPTIONAL.get(arch, ()))


def _plain_layer(arch: str, sizes: Sizes) -> Iterator[tuple[str, Slot]]:
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    if arch == "phi3":
        shapes["attn_qkv"] = (queries + 2 * keys, hidden)
        shapes["ffn_up"] = (2 * inner, hidden)
        shapes = {k: v for k, v in shapes.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
    shapes |= dict.fromkeys(_NORMS.get(arch, ("attn_norm", "ffn_norm")), (hidden,))
    if arch in ("qwen3", "gemma3"):
        shapes |= {"attn_q_norm": (sizes.head_dim,), "attn_k_norm": (sizes.head_dim,)}
    if arch == "olmo2":
        shapes |= {"attn_q_norm": (queries,), "attn_k_norm": (keys,)}
    for name, shape in shapes.items():
        yield f"{name}.weight", Slot(shape)
        if arch == "stablelm" and name.endswith("norm"):
            yield f"{name}.bias", Slot(shape)
        if name in _OPTIONAL.get(arch, ()):
            yield f"{name}.bias", Slot(shape[:1], is_optional=True)
        elif arch == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
            yield f"{name}.bias", Slot(shape[:1])

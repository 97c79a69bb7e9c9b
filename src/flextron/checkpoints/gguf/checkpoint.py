"""Reading a GGUF file as if it were a Hugging Face checkpoint: config, dequantised tensors and tokenizer.

llama.cpp's converter renames tensors and rearranges some of them; here everything goes back to Hugging Face's layout,
so that nothing else in the package knows where a checkpoint came from. Names come from the `gguf` package's own map and
the family's tensor list. What the converter rearranges:

- Llama: the rows of each query and key head, for a rotation of neighbouring instead of opposite dimensions;
- Granite, SmolLM3: the same;
- Gemma: norms, whose gains are stored with the 1 that the model adds;
- GPT-2: linear layers, from Conv1D's (in, out) to (out, in);
- GPT-NeoX: fused QKV, from one head after the other to all queries, all keys, all values;
- Llama 3: its rope scaling, from four numbers to one factor per frequency.

No key names the activation; it is the one that published models of the architecture have by default.
Metadata holds 32-bit floats, so 1e-5 comes back as 9.99999974e-06; floats are rounded to the seven digits they have.
Sizes are compared with the tensors before anything is built, so that no number of the metadata costs memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from flextron.checkpoints.families import FAMILIES, TensorMap
from flextron.checkpoints.gguf.file import GgufTensor, read_file, shown
from flextron.checkpoints.gguf.keys import Metadata
from flextron.checkpoints.gguf.rope import rope_scaling, rotated_dimensions
from flextron.checkpoints.gguf.sampling import generation_config_from_metadata
from flextron.checkpoints.gguf.shapes import Sizes, Slot, read_sizes, slots
from flextron.checkpoints.gguf.tokenizer import tokenizer_from_metadata
from flextron.checkpoints.gguf.vocabulary import end_ids, special_ids
from flextron.checkpoints.pretrained import Pretrained
from flextron.errors import FlextronError, UnsupportedModelError

__all__ = ["open_gguf"]

_MODEL_TYPES = {
    **{"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "gptneox": "gpt_neox"},
    **{"gemma2": "gemma2", "gemma3": "gemma3_text", "smollm3": "smollm3", "phi3": "phi3", "granite": "granite"},
    **{"olmo2": "olmo2", "stablelm": "stablelm"},
}
"""GGUF's architecture names and the Hugging Face model types that they stand for."""
_INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures whose queries and keys are rotated by neighbouring dimensions."""
_ROPE_FREQS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A file whose metadata and tensors belong together."""

    metadata: Metadata
    tensors: Mapping[str, GgufTensor]
    sizes: Sizes
    slots: Mapping[str, Slot]

    @property
    def arch(self) -> str:
        """GGUF's name of the architecture."""
        return self.metadata.arch

    def has_biases(self, part: str) -> bool:
        """Whether any linear layer of the attention ("attn") or the MLP ("ffn") has one."""
        return any(f".{part}_" in name and name.endswith(".bias") and "norm" not in name for name in self.tensors)


def open_gguf(path: Path) -> Pretrained:
    """Open a `.gguf` file; tensors are dequantised to float32 one at a time while they are streamed.

    The tokenizer is None where the file has none.

    Raises:
        UnsupportedModelError: the file's architecture, a setting in its metadata or one of its tensors has no
            implementation.
        FlextronError: the file is missing, damaged, big-endian, one part of several, or lacks metadata; or its
            tokenizer is of an unknown kind.
    """
    file = _read(path)
    vocab_size = file.sizes.vocab_size
    tokenizer = tokenizer_from_metadata(file.metadata.values, max_length=file.sizes.context)
    if tokenizer is None:
        special = special_ids(file.metadata.values, vocab_size)
        bos, eos, pad = (special.get(f"{name}_token") for name in ("bos", "eos", "pad"))
    else:
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        if len(tokenizer) > vocab_size:
            raise FlextronError(
                f"{path} has {len(tokenizer)} tokens and an embedding of only {vocab_size}; convert it again"
            )
    ends = end_ids(file.metadata.values, vocab_size, eos)
    # all of them, for families differ in what they take where one is missing
    ids = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": pad}
    drawing = generation_config_from_metadata(file.metadata.values)
    return Pretrained(
        name=str(path),
        hf_config=_hf_config(file) | ids,
        tensors=partial(_stream, file, _targets(file)),
        tokenizer=tokenizer,
        generation_config={**{k: v for k, v in ids.items() if v is not None}, **drawing} if drawing else None,
    )


def _read(path: Path) -> _File:
    values, tensors = read_file(path)
    kind, num_parts = values.get("general.type", "model"), values.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if not isinstance(kind, str) or kind != "model":
        raise FlextronError(f"{path} holds no model but is of type {shown(kind)}; give a model's file")
    if not isinstance(num_parts, int) or num_parts > 1:
        raise FlextronError(f"{path} is one part of several; join them with `llama-gguf-split --merge` first")
    arch = values.get(gguf.Keys.General.ARCHITECTURE)
    if not isinstance(arch, str) or arch not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"GGUF architecture {shown(arch)} is not supported; supported are {', '.join(_MODEL_TYPES)}"
        )
    metadata = Metadata(path, arch, values)
    metadata.check()
    sizes = read_sizes(metadata, tensors)
    file = _File(metadata=metadata, tensors=tensors, sizes=sizes, slots=slots(arch, sizes))
    _check_tensors(file)
    _check_settings(file)
    return file


def _variant(metadata: Metadata, tensor: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{metadata.path} is a variant of {metadata.arch} that is not supported: "
        f"a plain one has no tensor {shown(tensor)}"
    )


def _check_tensors(file: _File) -> None:
    """Compare the tensors with those of a plain model."""
    path, known = file.metadata.path, file.slots.keys() | ({_ROPE_FREQS} if file.arch in _INTERLEAVED else set())
    if unknown := sorted(file.tensors.keys() - known):
        raise _variant(file.metadata, unknown[0])
    for name, slot in file.slots.items():
        if name not in file.tensors:
            if not slot.is_optional:
                raise FlextronError(f"{path} has no tensor {name}; convert the model again")
        elif file.tensors[name].shape != slot.shape:
            raise FlextronError(
                f"{path} has tensor {name} of shape {file.tensors[name].shape} where its metadata asks for "
                f"{slot.shape}; convert the model again"
            )


def _check_settings(file: _File) -> None:
    """Refuse settings that no config of the family expresses."""
    metadata, sizes = file.metadata, file.sizes
    usual = sizes.head_dim**-0.5
    has_scale = metadata.get("attention.scale") and file.arch != "granite"
    if has_scale and not math.isclose(metadata.positive("attention.scale"), usual, rel_tol=1e-5):
        raise UnsupportedModelError(f"{metadata.path} scales attention scores in its own way; only the usual is read")
    if not metadata.flag("attention.causal", True):
        raise UnsupportedModelError(f"{metadata.path} holds an encoder, whose attention is not causal")
    has_window = metadata.get("attention.sliding_window") and file.arch not in ("gemma2", "gemma3", "phi3")
    if has_window and metadata.count("attention.sliding_window") < sizes.context:
        raise UnsupportedModelError(
            f"{metadata.path} has a sliding window, which is not read from GGUF; use the Hugging Face checkpoint"
        )
    if metadata.count("embedding_length_out", sizes.hidden_size) != sizes.hidden_size:
        raise UnsupportedModelError(f"{metadata.path} has outputs of another size than its embedding")
    if FAMILIES[_MODEL_TYPES[file.arch]].heads_divide_hidden and sizes.hidden_size % sizes.num_heads:
        raise UnsupportedModelError(
            f"{metadata.path} has {sizes.num_heads} heads, which do not divide the hidden size {sizes.hidden_size}: "
            f"transformers has no such {file.arch}"
        )
    if file.arch != "gptneox" and metadata.flag("use_parallel_residual", False):
        raise UnsupportedModelError(f"{metadata.path} has parallel residuals, which a plain {file.arch} model has not")


def _targets(file: _File) -> dict[str, tuple[str, TensorMap]]:
    """Hugging Face's name and layout of each tensor that the family can have, by its name in the file."""
    num_layers = file.sizes.num_layers
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch)
    names = gguf.get_tensor_name_map(arch, num_layers)
    targets = {}
    for tensor_map in FAMILIES[_MODEL_TYPES[file.arch]].tensors:
        for i in range(num_layers if "{i}" in tensor_map.hf else 1):
            hf_name = tensor_map.hf.format(i=i)
            name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            if name is not None:
                targets[name] = (hf_name, tensor_map)
    return targets


def _stream(file: _File, targets: Mapping[str, tuple[str, TensorMap]]) -> Iterator[tuple[str, Tensor]]:
    """Dequantise tensor after tensor, and lay each out as Hugging Face does."""
    for name, tensor in file.tensors.items():
        if name != _ROPE_FREQS:
            # a copy, because float32 tensors are views of the file, which is mapped read-only
            rows = torch.from_numpy(np.array(tensor.values(), dtype=np.float32))
            yield targets[name][0], _as_hugging_face(file, name, rows, targets[name][1])
    for name, slot in file.slots.items():
        is_bias = slot.is_optional and name.endswith(".bias")
        if is_bias and name not in file.tensors and file.has_biases(name.split(".")[2].split("_")[0]):
            yield targets[name][0], torch.zeros(slot.shape)


def _as_hugging_face(file: _File, name: str, rows: Tensor, tensor_map: TensorMap) -> Tensor:
    """Undo what the converter rearranged."""
    if file.arch in _INTERLEAVED and ".attn_q." in name:
        rows = _opposite_pairs(rows, file.sizes.num_heads)
    elif file.arch in _INTERLEAVED and ".attn_k." in name:
        rows = _opposite_pairs(rows, file.sizes.num_kv_heads)
    elif file.arch.startswith("gemma") and name.endswith("norm.weight"):
        rows = rows - 1
    elif len(tensor_map.ours) > 1 and file.arch == "phi3":
        return rows  # as Hugging Face fuses them
    parts = rows.chunk(len(tensor_map.ours))
    return tensor_map.join([p.t() for p in parts] if tensor_map.contracts else parts, file.sizes.head_dim)


def _opposite_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """Undo the interleaving of each head's rows: row i is rotated with row i + head_dim / 2, not with its neighbour."""
    by_pair: Tensor = rows.unflatten(0, (num_heads, -1, 2))
    return by_pair.transpose(1, 2).flatten(0, 2)


def _hf_config(file: _File) -> dict[str, Any]:
    """The equivalent of `config.json`."""
    model_type = _MODEL_TYPES[file.arch]
    own = _KEYS.get(file.arch, _llama_keys)
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": file.sizes.vocab_size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **own(file),
    }


def _gpt2_keys(file: _File) -> dict[str, Any]:
    return {
        "n_embd": file.sizes.hidden_size,
        "n_layer": file.sizes.num_layers,
        "n_head": file.sizes.num_heads,
        "n_inner": file.sizes.intermediate_size,
        "n_positions": file.sizes.context,
        "layer_norm_epsilon": file.metadata.positive("attention.layer_norm_epsilon"),
    }


def _rotary_keys(file: _File, *, may_be_partial: bool) -> tuple[dict[str, Any], int]:
    """What all families but GPT-2 share, and how many dimensions of each head are rotated."""
    sizes = file.sizes
    rotated = rotated_dimensions(file.metadata, sizes.head_dim, may_be_partial=may_be_partial)
    freqs = file.tensors[_ROPE_FREQS].values() if _ROPE_FREQS in file.tensors else None
    return {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": sizes.context,
        "rope_scaling": rope_scaling(file.metadata, freqs, rotated),
    }, rotated


def _neox_keys(file: _File) -> dict[str, Any]:
    keys, rotated = _rotary_keys(file, may_be_partial=True)
    return keys | {
        "layer_norm_eps": file.metadata.positive("attention.layer_norm_epsilon"),
        "rotary_emb_base": file.metadata.positive("rope.freq_base", 10000.0),
        "rotary_pct": _fraction(rotated, file.sizes.head_dim),
        "use_parallel_residual": file.metadata.flag("use_parallel_residual"),
        "attention_bias": file.has_biases("attn"),
    }


def _fraction(part: int, whole: int) -> float:
    """A fraction of the whole that truncates to the part, as `transformers` reads it."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1.0)


def _llama_keys(file: _File) -> dict[str, Any]:
    keys, _ = _rotary_keys(file, may_be_partial=False)
    keys |= {
        "num_key_value_heads": file.sizes.num_kv_heads,
        "head_dim": file.sizes.head_dim,
        "rms_norm_eps": file.metadata.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.metadata.positive("rope.freq_base", 10000.0),
    }
    if file.arch != "qwen2":  # its biases are part of the architecture
        keys["attention_bias"] = file.has_biases("attn")
    if file.arch == "llama":
        keys["mlp_bias"] = file.has_biases("ffn")
    return keys


def _gemma_keys(file: _File) -> dict[str, Any]:
    """Gemma 2 and 3: what llama.cpp knows of the architecture without a key is written out."""
    metadata, sizes = file.metadata, file.sizes
    is_second = file.arch == "gemma2"
    # the largest of each generation alone scales queries by another size than the head's
    is_largest = sizes.num_layers == (46 if is_second else 62)
    period = metadata.count("attention.sliding_window_pattern", 2 if is_second else 6)
    window = metadata.count("attention.sliding_window", 4096 if is_second else None)
    keys = _llama_keys(file) | {
        "query_pre_attn_scalar": sizes.hidden_size // sizes.num_heads if is_largest else sizes.head_dim,
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if i % period < period - 1 else "full_attention" for i in range(sizes.num_layers)
        ],
        "final_logit_softcapping": _cap(metadata, "final_logit_softcapping", 30.0 if is_second else None),
    }
    if is_second:
        return keys | {"attn_logit_softcapping": _cap(metadata, "attn_logit_softcapping", 50.0)}
    return keys | {"rope_local_base_freq": metadata.positive("rope.freq_base_swa", 10000.0)}


def _cap(metadata: Metadata, name: str, default: float | None) -> float | None:
    """A cap of scores or logits; 0 means none."""
    if not metadata.has(name):
        return default
    return metadata.positive(name) if metadata.get(name) else None


def _granite_keys(file: _File) -> dict[str, Any]:
    def factor(name: str, default: float) -> float:
        """A factor, where 0 means the default as in llama.cpp."""
        return file.metadata.positive(name) if file.metadata.get(name) else default

    return _llama_keys(file) | {
        "mlp_bias": file.has_biases("ffn"),
        "embedding_multiplier": factor("embedding_scale", 1.0),
        "residual_multiplier": factor("residual_scale", 1.0),
        "attention_multiplier": factor("attention.scale", file.sizes.head_dim**-0.5),
        "logits_scaling": factor("logit_scale", 1.0),
    }


def _smollm3_keys(file: _File) -> dict[str, Any]:
    rotates = [int((i + 1) % 4 != 0) for i in range(file.sizes.num_layers)]  # llama.cpp knows no other pattern
    return _llama_keys(file) | {"mlp_bias": file.has_biases("ffn"), "no_rope_layers": rotates}


def _stablelm_keys(file: _File) -> dict[str, Any]:
    keys, rotated = _rotary_keys(file, may_be_partial=True)
    return keys | {
        "num_key_value_heads": file.sizes.num_kv_heads,
        "layer_norm_eps": file.metadata.positive("attention.layer_norm_epsilon"),
        "rope_theta": file.metadata.positive("rope.freq_base", 10000.0),
        "partial_rotary_factor": _fraction(rotated, file.sizes.head_dim),
        "use_qkv_bias": file.has_biases("attn"),
    }


def _phi3_keys(file: _File) -> dict[str, Any]:
    keys, rotated = _rotary_keys(file, may_be_partial=True)
    window = file.metadata.get("attention.sliding_window")
    return keys | {
        "num_key_value_heads": file.sizes.num_kv_heads,
        "rms_norm_eps": file.metadata.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.metadata.positive("rope.freq_base", 10000.0),
        "partial_rotary_factor": _fraction(rotated, file.sizes.head_dim),
        "sliding_window": file.metadata.count("attention.sliding_window") if window else None,
    }


_KEYS: Mapping[str, Callable[[_File], dict[str, Any]]] = {
    "gpt2": _gpt2_keys,
    "gptneox": _neox_keys,
    "gemma2": _gemma_keys,
    "gemma3": _gemma_keys,
    "granite": _granite_keys,
    "smollm3": _smollm3_keys,
    "stablelm": _stablelm_keys,
    "phi3": _phi3_keys,
}
"""Keys of `config.json`, of architectures that have others than Llama's."""

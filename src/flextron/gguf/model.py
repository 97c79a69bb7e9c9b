"""A GGUF file whose metadata and tensors belong together: those of a plain model of its architecture.

Sizes are compared with the tensors before anything is built, so that no number of the metadata costs memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from flextron.errors import FlextronError, UnsupportedModelError, shown
from flextron.families.config import FAMILIES
from flextron.gguf.file import GgufTensor, read_file
from flextron.gguf.keys import Metadata
from flextron.gguf.shapes import Sizes, Slot, read_sizes, slots

__all__ = ["INTERLEAVED", "LONG_FACTORS", "MODEL_TYPES", "ROPE_FREQS", "GgufModel", "read_model"]

MODEL_TYPES = {
    **{"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "gptneox": "gpt_neox"},
    **{"gemma2": "gemma2", "gemma3": "gemma3_text", "smollm3": "smollm3", "phi3": "phi3", "granite": "granite"},
    **{"olmo2": "olmo2", "stablelm": "stablelm"},
}
"""GGUF's architecture names and the Hugging Face model types that they stand for."""
INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures whose queries and keys are rotated by neighbouring dimensions."""
ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""Phi-3's factors of rotary frequencies, by Hugging Face's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufModel:
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


def read_model(path: Path) -> GgufModel:
    """Read a file and see that it holds a plain model.

    Raises:
        FlextronError: it does not, or is damaged.
    """
    values, tensors = read_file(path)
    kind, num_parts = values.get("general.type", "model"), values.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if not isinstance(kind, str) or kind != "model":
        raise FlextronError(f"{path} holds no model but is of type {shown(kind)}; give a model's file")
    if not isinstance(num_parts, int) or num_parts > 1:
        raise FlextronError(f"{path} is one part of several; join them with `llama-gguf-split --merge` first")
    arch = values.get(gguf.Keys.General.ARCHITECTURE)
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"GGUF architecture {shown(arch)} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    metadata = Metadata(path, arch, values)
    metadata.check()
    sizes = read_sizes(metadata, tensors)
    file = GgufModel(metadata=metadata, tensors=tensors, sizes=sizes, slots=slots(arch, sizes))
    _check_tensors(file)
    _check_settings(file)
    return file


def _variant(metadata: Metadata, tensor: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{metadata.path} is a variant of {metadata.arch} that is not supported: "
        f"a plain one has no tensor {shown(tensor)}"
    )


def _check_tensors(file: GgufModel) -> None:
    """Compare the tensors with those of a plain model."""
    path, factors = file.metadata.path, {"phi3": {*LONG_FACTORS.values()}}
    known = file.slots.keys() | ({ROPE_FREQS} if file.arch in INTERLEAVED else factors.get(file.arch, set()))
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


def _check_settings(file: GgufModel) -> None:
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
    if FAMILIES[MODEL_TYPES[file.arch]].heads_divide_hidden and sizes.hidden_size % sizes.num_heads:
        raise UnsupportedModelError(
            f"{metadata.path} has {sizes.num_heads} heads, which do not divide the hidden size {sizes.hidden_size}: "
            f"transformers has no such {file.arch}"
        )
    if file.arch != "gptneox" and metadata.flag("use_parallel_residual", False):
        raise UnsupportedModelError(f"{metadata.path} has parallel residuals, which a plain {file.arch} model has not")

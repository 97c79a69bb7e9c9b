"""Reading a GGUF file as if it were a Hugging Face checkpoint: config, dequantised tensors and tokenizer.

llama.cpp's converter renames tensors and rearranges some of them; here everything goes back to Hugging Face's layout,
so that nothing else in the package knows where a checkpoint came from. Names come from the `gguf` package's own map and
the family's tensor list. What the converter rearranges:

- Llama: the rows of each query and key head, for a rotation of neighbouring instead of opposite dimensions;
- GPT-2: linear layers, from Conv1D's (in, out) to (out, in);
- GPT-NeoX: fused QKV, from one head after the other to all queries, all keys, all values;
- Llama 3: its rope scaling, from four numbers to one factor per frequency.

Metadata holds 32-bit floats, so 1e-5 comes back as 9.99999974e-06; floats are rounded to the seven digits they have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.model.families import FAMILIES, TensorMap
from flextron.model.gguf_tokenizer import tokenizer_from_metadata
from flextron.model.pretrained import Pretrained

__all__ = ["open_gguf"]

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "gptneox": "gpt_neox"}
"""GGUF's architecture names and the Hugging Face model types that they stand for."""
_ROPE_FREQS = "rope_freqs.weight"
_LLM, _ATTENTION, _ROPE, _TOKENIZER = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """The parsed header of a file, and views of its tensors that are read from disk when used."""

    path: Path
    arch: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]

    def value(self, key: str, default: Any = None) -> Any:
        """An entry of the metadata, `{arch}` in its key filled in."""
        return self.metadata.get(key.format(arch=self.arch), default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the metadata, floats rounded to the digits that 32 bits hold."""
        value = self.value(key, default)
        if not isinstance(value, int | float):
            name = key.format(arch=self.arch)
            raise FlextronError(f"{self.path} needs one number as {name}, not {value!r}; convert the model again")
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def rows(self, name: str) -> int:
        """Rows of a tensor; GGUF lists dimensions from the innermost outwards."""
        if name not in self.tensors:
            raise FlextronError(f"{self.path} has no tensor {name}; convert the model again")
        return int(self.tensors[name].shape[-1])

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        per_head = self.number(_LLM.EMBEDDING_LENGTH) // self.number(_ATTENTION.HEAD_COUNT)
        return int(self.number(_ATTENTION.KEY_LENGTH, per_head))

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.number(_ATTENTION.HEAD_COUNT))

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads; files of models that have as many as query heads may leave it out."""
        return int(self.number(_ATTENTION.HEAD_COUNT_KV, self.num_heads))


def open_gguf(path: Path) -> Pretrained:
    """Open a `.gguf` file; tensors are dequantised to float32 one at a time while they are streamed.

    The tokenizer is None where the file has none.

    Raises:
        UnsupportedModelError: the file's architecture, its rope scaling or one of its tensors has no implementation.
        FlextronError: the file is missing, damaged, one part of several, or lacks metadata; or its tokenizer is of an
            unknown kind.
    """
    file = _read(path)
    targets = _targets(file)
    unknown = sorted(file.tensors.keys() - targets.keys() - {_ROPE_FREQS})
    if unknown:
        raise UnsupportedModelError(
            f"{path} is a variant of {file.arch} that is not supported: a plain one has no tensor {unknown[0]}"
        )
    return Pretrained(
        name=str(path),
        hf_config=_hf_config(file),
        tensors=partial(_stream, file, targets),
        tokenizer=tokenizer_from_metadata(file.metadata, max_length=int(file.number(_LLM.CONTEXT_LENGTH))),
    )


def _read(path: Path) -> _File:
    """Parse the header."""
    if not path.is_file():
        raise FlextronError(f"{path} is not a file; give the path of a .gguf file")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise FlextronError(f"{path} is not a GGUF file; give one, or a Hugging Face directory")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError) as error:
        raise FlextronError(f"{path} is cut short or damaged; download or convert it again ({error})") from error
    if metadata.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 1) > 1:
        raise FlextronError(f"{path} is one part of several; join them with `llama-gguf-split --merge` first")
    arch = str(metadata.get(gguf.Keys.General.ARCHITECTURE))
    if arch not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"GGUF architecture {arch} is not supported; supported are {', '.join(_MODEL_TYPES)}"
        )
    return _File(path=path, arch=arch, metadata=metadata, tensors={t.name: t for t in reader.tensors})


def _targets(file: _File) -> dict[str, tuple[str, TensorMap]]:
    """For each tensor that the family can have, by its name in the file: Hugging Face's name, and its layout there."""
    num_layers = int(file.number(_LLM.BLOCK_COUNT))
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
        if name == _ROPE_FREQS:
            continue
        hf_name, tensor_map = targets[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise FlextronError(f"{file.path} holds {name} as {kind}, which cannot be read; requantise it") from error
        # A copy, because float32 tensors are views of the file, which is mapped read-only.
        rows = torch.from_numpy(np.array(values, dtype=np.float32))
        if file.arch == "llama" and ".attn_q." in name:
            rows = _opposite_pairs(rows, file.num_heads)
        elif file.arch == "llama" and ".attn_k." in name:
            rows = _opposite_pairs(rows, file.num_kv_heads)
        parts = rows.chunk(len(tensor_map.ours))
        yield hf_name, tensor_map.join([p.t() for p in parts] if tensor_map.contracts else parts, file.head_dim)


def _opposite_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """Undo the interleaving of each head's rows: row i is rotated with row i + head_dim / 2, not with its neighbour."""
    by_pair: Tensor = rows.unflatten(0, (num_heads, -1, 2))
    return by_pair.transpose(1, 2).flatten(0, 2)


def _hf_config(file: _File) -> dict[str, Any]:
    """The equivalent of `config.json`."""
    model_type = _MODEL_TYPES[file.arch]
    own = {"gpt2": _gpt2_keys, "gpt_neox": _neox_keys}.get(model_type, _llama_keys)
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": file.rows("token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.value(_TOKENIZER.BOS_ID),
        "eos_token_id": file.value(_TOKENIZER.EOS_ID),
        **own(file),
    }


def _gpt2_keys(file: _File) -> dict[str, Any]:
    return {
        "n_embd": file.number(_LLM.EMBEDDING_LENGTH),
        "n_layer": file.number(_LLM.BLOCK_COUNT),
        "n_head": file.num_heads,
        "n_inner": file.number(_LLM.FEED_FORWARD_LENGTH),
        "n_positions": file.rows("position_embd.weight"),
        "layer_norm_epsilon": file.number(_ATTENTION.LAYERNORM_EPS),
    }


def _rotary_keys(file: _File) -> dict[str, Any]:
    """What all families but GPT-2 share."""
    return {
        "hidden_size": file.number(_LLM.EMBEDDING_LENGTH),
        "intermediate_size": file.number(_LLM.FEED_FORWARD_LENGTH),
        "num_hidden_layers": file.number(_LLM.BLOCK_COUNT),
        "num_attention_heads": file.num_heads,
        "max_position_embeddings": file.number(_LLM.CONTEXT_LENGTH),
        "rope_scaling": _rope_scaling(file),
    }


def _neox_keys(file: _File) -> dict[str, Any]:
    return _rotary_keys(file) | {
        "layer_norm_eps": file.number(_ATTENTION.LAYERNORM_EPS),
        "rotary_emb_base": file.number(_ROPE.FREQ_BASE, 10000.0),
        "rotary_pct": file.number(_ROPE.DIMENSION_COUNT) / file.head_dim,
        "use_parallel_residual": file.value(_LLM.USE_PARALLEL_RESIDUAL, True),
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def _llama_keys(file: _File) -> dict[str, Any]:
    keys = _rotary_keys(file) | {
        "num_key_value_heads": file.num_kv_heads,
        "head_dim": file.head_dim,
        "rms_norm_eps": file.number(_ATTENTION.LAYERNORM_RMS_EPS),
        "rope_theta": file.number(_ROPE.FREQ_BASE, 10000.0),
    }
    if file.arch != "qwen2":  # its biases are part of the architecture
        keys["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if file.arch == "llama":
        keys["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return keys


def _rope_scaling(file: _File) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`."""
    kind = file.value(_ROPE.SCALING_TYPE, "none")
    if _ROPE_FREQS in file.tensors:
        return _llama3_scaling(file)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number(_ROPE.SCALING_FACTOR)}
    raise UnsupportedModelError(f"rope scaling of type {kind!r} is not supported; none, linear and llama3 are")


def _llama3_scaling(file: _File) -> dict[str, Any] | None:
    """The four numbers behind Llama 3's factors, one per frequency.

    Short wavelengths are left alone (1), long ones are stretched by the full factor, and between them the weight of the
    unstretched frequency rises linearly with (original context / wavelength) from `low_freq_factor` to
    `high_freq_factor`. Only ratios of the last three numbers show in the factors; `low_freq_factor` is 1 by custom.
    """
    factors = np.asarray(file.tensors[_ROPE_FREQS].data, dtype=np.float64)
    if np.allclose(factors, 1):
        return None
    factor = float(f"{factors.max():.5g}")
    exponents = np.arange(len(factors)) / len(factors)
    waves = file.number(_ROPE.FREQ_BASE, 10000.0) ** -exponents / (2 * math.pi)  # per token
    between = (factors > 1 + 1e-5) & (factors < factor * (1 - 1e-5))
    if between.sum() >= 2:
        weights = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(waves[between], weights, 1)
        context, high = round(-slope / offset), float(f"{1 - 1 / offset:.4g}")
        weights = np.clip((context * waves - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - weights) / factor + weights), factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise FlextronError(f"{file.path} has rope factors that are not Llama 3's; use the Hugging Face checkpoint instead")

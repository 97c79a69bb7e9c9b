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
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.families.config import FAMILIES, TensorMap
from flextron.families.pretrained import Pretrained
from flextron.gguf.hf_config import hf_config_of
from flextron.gguf.model import INTERLEAVED, LONG_FACTORS, MODEL_TYPES, ROPE_FREQS, GgufModel, read_model
from flextron.gguf.sampling import generation_config_from_metadata
from flextron.gguf.tokenizer import tokenizer_from_metadata
from flextron.gguf.vocabulary import end_ids, special_ids

__all__ = ["open_gguf"]


def open_gguf(path: Path) -> Pretrained:
    """Open a `.gguf` file; tensors are dequantised to float32 one at a time while they are streamed.

    The tokenizer is None where the file has none.

    Raises:
        UnsupportedModelError: the file's architecture, a setting in its metadata or one of its tensors has no
            implementation.
        FlextronError: the file is missing, damaged, big-endian, one part of several, or lacks metadata; or its
            tokenizer is of an unknown kind.
    """
    file = read_model(path)
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
        hf_config=hf_config_of(file) | ids,
        tensors=partial(_stream, file, _targets(file)),
        tokenizer=tokenizer,
        generation_config={**{k: v for k, v in ids.items() if v is not None}, **drawing} if drawing else None,
    )


def _targets(file: GgufModel) -> dict[str, tuple[str, TensorMap]]:
    """Hugging Face's name and layout of each tensor that the family can have, by its name in the file."""
    num_layers = file.sizes.num_layers
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch)
    names = gguf.get_tensor_name_map(arch, num_layers)
    targets = {}
    for tensor_map in FAMILIES[MODEL_TYPES[file.arch]].tensors:
        for i in range(num_layers if "{i}" in tensor_map.hf else 1):
            hf_name = tensor_map.hf.format(i=i)
            name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            if name is not None:
                targets[name] = (hf_name, tensor_map)
    return targets


def _stream(file: GgufModel, targets: Mapping[str, tuple[str, TensorMap]]) -> Iterator[tuple[str, Tensor]]:
    """Dequantise tensor after tensor, and lay each out as Hugging Face does."""
    for name, tensor in file.tensors.items():
        if name not in (ROPE_FREQS, *LONG_FACTORS.values()):
            # a copy, because float32 tensors are views of the file, which is mapped read-only
            rows = torch.from_numpy(np.array(tensor.values(), dtype=np.float32))
            yield targets[name][0], _as_hugging_face(file, name, rows, targets[name][1])
    for name, slot in file.slots.items():
        is_bias = slot.is_optional and name.endswith(".bias")
        if is_bias and name not in file.tensors and file.has_biases(name.split(".")[2].split("_")[0]):
            yield targets[name][0], torch.zeros(slot.shape)


def _as_hugging_face(file: GgufModel, name: str, rows: Tensor, tensor_map: TensorMap) -> Tensor:
    """Undo what the converter rearranged."""
    if file.arch in INTERLEAVED and ".attn_q." in name:
        rows = _opposite_pairs(rows, file.sizes.num_heads)
    elif file.arch in INTERLEAVED and ".attn_k." in name:
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

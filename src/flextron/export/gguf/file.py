"""A sub-network as a GGUF file: metadata, then tensors, converted one at a time while they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flextron.export.format import Order
from flextron.export.gguf.architectures import architecture_for, own_architecture
from flextron.export.gguf.metadata import context_length, model_metadata
from flextron.export.gguf.tensors import FileTensor, file_tensors
from flextron.export.gguf.tokenizer import tokenizer_metadata
from flextron.export.source import Source
from flextron.export.widen import least_uniform
from flextron.files import new_file
from flextron.generation.defaults import generation_defaults
from flextron.gguf.sampling import SAMPLING, sampling_metadata
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Gguf"]

_Kind = gguf.GGMLQuantizationType
_PRECISIONS: Mapping[str, tuple[_Kind, gguf.LlamaFileType]] = {
    "float16": (_Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "float32": (_Kind.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (_Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_TABLES = ("token_embd.weight", "output.weight")
"""What llama.cpp's own quantizer keeps in more bits than the other matrices."""
_EXACT = ("position_embd.weight",)
"""Matrices that its converter keeps in 32 bits."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """The format `gguf`."""

    name: str = "gguf"
    suffix: str = ".gguf"
    precisions: tuple[str, ...] = tuple(_PRECISIONS)

    def widths(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """The sub-network's own, with zeros for skipped halves that an architecture does not know.

        Raises:
            FlextronError: no architecture of llama.cpp holds it.
        """
        return architecture_for(config, spec)[1]

    def padded(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """The narrowest equal widths that an architecture holds."""
        own_architecture(config)
        return least_uniform(config, spec, lambda widths: architecture_for(config, widths))

    def notes(self, config: DecoderConfig) -> tuple[str, ...]:
        """How far the file is exact."""
        tokens, notes = context_length(own_architecture(config), config), []
        if tokens != config.max_position_embeddings:
            said = f"llama.cpp has no sliding window for this architecture; up to {tokens} tokens of context are exact."
            notes.append(said)
        scaling = None if config.rope is None else config.rope.scaling
        if scaling is not None and scaling["rope_type"] == "longrope":
            longest = scaling["longest"]
            notes.append(
                f"In a context of more than {longest} tokens (n_ctx) llama.cpp rotates all texts as long ones."
            )
        return tuple(notes)

    def write(self, decoder: Decoder, source: Source, order: Order) -> str:
        """Write the file; returns llama.cpp's name of the architecture.

        Raises:
            FlextronError: there is a file already, or the tokenizer has no form in GGUF.
        """
        config = decoder.config
        architecture, _ = architecture_for(config, decoder.widths)
        kind, file_type = _PRECISIONS[order.precision]
        order.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(order.path, overwrite=order.overwrite) as temporary:
            model = model_metadata(architecture, config, decoder.widths)
            metadata = {f"{architecture.name}.{key}": value for key, value in model.items()}
            defaults = generation_defaults(source.generation_config, source.hf_config, source.tokenizer)
            metadata |= _general(source, order, file_type) | sampling_metadata(defaults)
            metadata |= tokenizer_metadata(
                source.tokenizer,
                vocab_size=config.vocab_size,
                ends=defaults.ends,
                arch=architecture.name,
            )
            _write(temporary, architecture.name, metadata, list(file_tensors(decoder, architecture)), kind)
        return architecture.name


def _general(source: Source, order: Order, file_type: gguf.LlamaFileType) -> dict[str, Any]:
    """What the file says of itself."""
    general = gguf.Keys.General
    origin = str(source.info.provenance.get("source") or "")
    return {
        general.TYPE: "model",
        general.NAME: f"{Path(origin).stem or source.decoder.config.family} ({order.spec.describe()})",
        general.DESCRIPTION: f"Sub-network of an elastic model, made with flextron: {order.spec.describe()}.",
        general.FILE_TYPE: int(file_type),
        general.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
    }


def _write(path: Path, arch: str, metadata: Mapping[str, Any], tensors: list[FileTensor], kind: _Kind) -> None:
    """Announce all tensors, then convert and write one after the other."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    kinds = [_kind_of(tensor, kind) for tensor in tensors]
    for tensor, own in zip(tensors, kinds, strict=True):
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, own)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, own in zip(tensors, kinds, strict=True):
        writer.write_tensor_data(gguf.quants.quantize(tensor.values().float().cpu().numpy(), own).view(np.uint8))
    writer.close()


def _kind_of(tensor: FileTensor, kind: _Kind) -> _Kind:
    """How a tensor is stored: vectors exactly, matrices as asked, and in 16 bits where rows are no whole blocks."""
    if len(tensor.shape) == 1 or tensor.name in _EXACT:
        return _Kind.F32
    if kind is _Kind.Q4_0 and tensor.name in _TABLES:
        kind = _Kind.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else _Kind.F16


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key, of the type that llama.cpp's converter gives it."""
    if key == gguf.Keys.Tokenizer.CHAT_TEMPLATE:
        named = value if isinstance(value, str) else [{"name": n, "template": t} for n, t in value.items()]
        writer.add_chat_template(named)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_int32 if key.startswith(SAMPLING) else writer.add_uint32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

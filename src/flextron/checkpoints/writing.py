"""Checkpoints out: a decoder as a Hugging Face checkpoint, under the names and in the layout of its family."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.checkpoints.generation_config import GENERATION_CONFIG
from flextron.checkpoints.tokenizer_files import write_tokenizer
from flextron.families.config import TensorMap, layer_maps
from flextron.families.stock import stock_config
from flextron.files import write_json
from flextron.model.decoder import Decoder

__all__ = ["stock_maps", "stock_tensors", "write_checkpoint", "write_files"]

_LEAST_SHARD_BYTES = 64 * 1024**2


def write_checkpoint(
    decoder: Decoder,
    directory: Path,
    *,
    hf_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write config, weights and tokenizer into an existing directory, as `transformers` lays them out.

    Args:
        decoder: uniform; its skipped layers are left out and the others renumbered.
        directory: to write into.
        hf_config: the config of the original checkpoint; its sizes are replaced by the decoder's.
        tokenizer: written beside the weights where given.
        generation_config: written too, if there is one.
        shard_bytes: size at which a new file begins; by default an eighth of the model, so that what must be laid out
            anew for writing needs little memory beside it, but no less than 64 MiB.

    Raises:
        FlextronError: the decoder's layers differ in width, or its family has no config for them.
    """
    write_files(
        decoder,
        directory,
        stock_config(decoder, hf_config),
        tokenizer=tokenizer,
        generation_config=generation_config,
        shard_bytes=shard_bytes,
    )


def write_files(
    decoder: Decoder,
    directory: Path,
    config: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """The same with a `config.json` of one's own, for any widths."""
    directory.joinpath("config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if shard_bytes is None:
        shard_bytes = max(_LEAST_SHARD_BYTES, sum(p.nbytes for p in decoder.parameters()) // 8)
    shards: list[dict[str, str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        name = f"part-{len(shards):05d}.safetensors"
        save_file(pending, directory / name, metadata={"format": "pt"})
        shards.append(dict.fromkeys(pending, name))
        pending.clear()

    for name, tensor in stock_tensors(decoder, {n: p.detach() for n, p in decoder.named_parameters()}):
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size, total = size + num_bytes, total + num_bytes
    flush()
    _name_shards(directory, shards, total)
    if tokenizer is not None:
        write_tokenizer(tokenizer, directory)
    if generation_config is not None:
        write_json(directory / GENERATION_CONFIG, generation_config)


def _name_shards(directory: Path, shards: list[dict[str, str]], total: int) -> None:
    """Give the parts their final names, and an index where there are several."""
    if len(shards) == 1:
        directory.joinpath("part-00000.safetensors").rename(directory / "model.safetensors")
        return
    final = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(final):
        directory.joinpath(f"part-{i:05d}.safetensors").rename(directory / name)
    weight_map = {name: final[i] for i, shard in enumerate(shards) for name in shard}
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def stock_tensors(decoder: Decoder, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Values of the decoder's parameters (weights, or gradients) under their checkpoint's names and in its layout."""
    for name, m in stock_maps(decoder, values):
        yield name, m.join([values[p] for p in m.ours], decoder.config.head_dim)


def stock_maps(decoder: Decoder, names: Container[str]) -> Iterator[tuple[str, TensorMap]]:
    """(Checkpoint name, map) of the tensors whose parameters are among `names`; skipped layers do not count."""
    number = {old: new for new, old in enumerate(decoder.widths.kept_layers)}
    for name, m in layer_maps(decoder.config, names):
        layer = re.match(r"layers\.(\d+)\.", m.ours[0])
        if layer:
            name = re.sub(r"(?<=\.)\d+(?=\.)", str(number[int(layer[1])]), name, count=1)
        yield name, m

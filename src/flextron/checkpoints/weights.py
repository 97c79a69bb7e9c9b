"""Weights in and out: the tensors of an opened checkpoint to a `Decoder`, and a decoder to a Hugging Face checkpoint.

Reading streams: shards are opened one after the other and each tensor is copied to its place, so the peak is the model
and one shard. Writing is the reverse, under the names and in the layout of the family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.checkpoints.origin import checked_origin
from flextron.checkpoints.tokenizer_files import write_tokenizer
from flextron.errors import FlextronError
from flextron.families.config import FAMILIES, TensorMap, config_from_hf, layer_maps
from flextron.families.pretrained import Pretrained
from flextron.families.stock import stock_config
from flextron.files import write_json
from flextron.generation.defaults import GENERATION_CONFIG
from flextron.model.decoder import Decoder

__all__ = ["load_decoder", "stock_maps", "stock_tensors", "write_checkpoint", "write_files"]

_BUFFERS = re.compile(r"rotary_emb\.inv_freq|attn\.(masked_)?bias$|attention\.(masked_)?bias$")
_EMBEDDING, _HEAD = "embedding.weight", "head.weight"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LEAST_SHARD_BYTES = 64 * 1024**2


def _joined_shape(tensor_map: TensorMap, shapes: list[torch.Size]) -> torch.Size:
    """The checkpoint's shape of parameters that it stacks by rows."""
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    return torch.Size(reversed(shape) if tensor_map.is_turned and len(shape) == 2 else shape)


def load_decoder(pretrained: Pretrained, dtype: torch.dtype = torch.float32) -> Decoder:
    """Build the decoder of a checkpoint and fill it, on the CPU.

    Memory is taken as tensors arrive, so a config cannot ask for more than the files hold. Of embedding and head, the
    file decides what is tied: one of a tied pair is both, and two that differ are two.

    Raises:
        FlextronError: tensors are missing, have the wrong shape or type, or hold NaN or infinity.
    """
    config = config_from_hf(pretrained.hf_config)
    if pretrained.directory is not None:
        config = replace(config, origin=checked_origin(pretrained.directory, config))
    if pretrained.names is not None and len(pretrained.names) < config.num_hidden_layers:
        raise FlextronError(
            f"config.json has {config.num_hidden_layers} layers, the checkpoint {len(pretrained.names)} tensors; they "
            "do not belong together"
        )
    with torch.device("meta"):
        untied = Decoder(replace(config, tie_word_embeddings=False))
    weights = _read_weights(untied, pretrained.tensors(), dtype)
    tied = config.tie_word_embeddings and _tie(weights)
    wanted = layer_maps(untied.config, dict(untied.named_parameters()))
    lacking = [name for name, m in wanted if not all(p in weights or (tied and p == _HEAD) for p in m.ours)]
    if lacking:
        raise FlextronError(f"the checkpoint lacks {len(lacking)} tensors, first {lacking[0]}; download it again")
    with torch.device("meta"):
        decoder = Decoder(replace(config, tie_word_embeddings=tied)).to(dtype)
    decoder.load_state_dict(weights, assign=True)
    return decoder


@torch.no_grad()
def _tie(weights: dict[str, Tensor]) -> bool:
    """Make one parameter of a pair that the config ties, if it is one."""
    if _HEAD in weights and _EMBEDDING in weights and not torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        return False
    if _HEAD in weights:
        weights[_EMBEDDING] = weights.pop(_HEAD)
    return True


@torch.no_grad()
def _read_weights(decoder: Decoder, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the parameters that a stream of (checkpoint name, tensor) holds, by their names here.

    Args:
        decoder: has the shapes.
        tensors: the stream.
        dtype: type of the copies.

    Raises:
        FlextronError: as for `load_decoder`.
    """
    family, parameters = FAMILIES[decoder.config.family], dict(decoder.named_parameters())
    wanted = dict(layer_maps(decoder.config, parameters))
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors:
        key = family.aliases.get(name, name)
        # checkpoints of the base model alone leave out its prefix (GPT-2's on the hub do)
        key = key if key in wanted else family.prefix + name
        if key not in wanted:
            if _BUFFERS.search(name):
                continue
            raise FlextronError(
                f"the checkpoint holds {name}, which a {decoder.config.family} model has no place for; config.json and "
                "weights do not belong together"
            )
        _check_tensor(name, tensor, _joined_shape(wanted[key], [parameters[p].shape for p in wanted[key].ours]))
        sizes = [parameters[p].shape[0] for p in wanted[key].ours]
        for target, part in zip(
            wanted[key].ours, wanted[key].split(tensor, sizes, decoder.config.head_dim), strict=True
        ):
            copied = torch.empty(part.shape, dtype=dtype).copy_(part)
            if not torch.equal(weights.setdefault(target, copied), copied):
                raise FlextronError(f"the checkpoint holds {key} under two names, with two values; remove one of them")
    return weights


def _check_tensor(name: str, tensor: Tensor, expected: torch.Size) -> None:
    """See that a tensor is what the config says, before anything is computed with it."""
    if tensor.shape != expected:
        raise FlextronError(
            f"tensor {name} has shape {tuple(tensor.shape)} where the config asks for {tuple(expected)}; "
            "config.json and weights do not belong together"
        )
    if tensor.dtype not in _DTYPES:
        raise FlextronError(
            f"tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; quantised weights are not "
            "supported, use the original in bf16, fp16 or fp32"
        )
    # the extremes are not finite if anything is not, and need no copy of the tensor
    if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        raise FlextronError(f"tensor {name} holds NaN or infinity; the checkpoint is damaged, download it again")


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

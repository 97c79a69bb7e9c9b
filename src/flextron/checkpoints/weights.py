"""Weights in: the tensors of an opened checkpoint, checked and put into a `Decoder`.

Reading streams: shards are opened one after the other and each tensor is copied to its place, so the peak is the model
and one shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flextron.checkpoints.origin import checked_origin
from flextron.errors import FlextronError
from flextron.families.config import FAMILIES, TensorMap, config_from_hf, layer_maps
from flextron.families.pretrained import Pretrained
from flextron.model.decoder import Decoder

__all__ = ["load_decoder"]

_BUFFERS = re.compile(r"rotary_emb\.inv_freq|attn\.(masked_)?bias$|attention\.(masked_)?bias$")
_EMBEDDING, _HEAD = "embedding.weight", "head.weight"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

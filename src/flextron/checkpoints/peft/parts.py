"""A linear's tensors in peft's files as bypasses here, one for each linear that it holds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextron.checkpoints.peft.config import is_targeted
from flextron.checkpoints.peft.layout import Module
from flextron.errors import FlextronError, shown
from flextron.model.bypass import Bypass, Dora, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig

__all__ = ["MAGNITUDES", "bypasses_of", "check_targeted", "scale_of", "take"]

MAGNITUDES = "lora_magnitude_vector"
"""DoRA's lengths of rows."""


def take(tensors: dict[str, Tensor], keys: Sequence[str]) -> list[Tensor] | None:
    """These tensors, which are gone then; None if one of them is not there.

    Raises:
        FlextronError: one holds NaN or infinity.
    """
    if not all(key in tensors for key in keys):
        return None
    own = [tensors.pop(key) for key in keys]
    for key, tensor in zip(keys, own, strict=True):
        if not bool(tensor.isfinite().all()):
            raise FlextronError(f"the adapter's {key} holds NaN or infinity; it is damaged")
    return own


def check_targeted(settings: Mapping[str, Any], name: str, directory: Path) -> None:
    """Raise if peft would leave out what is stored for a module."""
    if not is_targeted(settings, name):
        raise FlextronError(
            f"the adapter in {directory} has tensors of {name}, which its config does not name as a target, "
            "so that peft leaves them out; restore adapter_config.json"
        )


def scale_of(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """What a module's low-rank product is multiplied by.

    Raises:
        FlextronError: the rank is none that the config names.
    """
    if rank not in (ranks := {settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()}):
        raise FlextronError(
            f"the adapter of {name} has rank {rank}, its config says {shown(sorted(ranks))}; the files do not "
            "belong together"
        )
    # peft's rule: a key is a regular expression for the end of the module's name
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(matching, settings.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def bypasses_of(
    own: list[Tensor], shapes: list[Shape], module: Module, config: DecoderConfig, settings: Mapping[str, Any]
) -> list[Bypass]:
    """The bypasses in one linear of the checkpoint; those of DoRA are still to be settled.

    Args:
        own: A and B, with lengths of rows for DoRA; or IA3's factors.
        shapes: shapes of the linears here.
        module: the linear of the checkpoint.
        config: the decoder's.
        settings: what `adapter_config.json` holds.

    Raises:
        FlextronError: sizes are another model's.
    """
    _check_shapes(module.name, own, Shape(shapes[0].inputs, sum(s.outputs for s in shapes)))
    return (_split_lora if len(own) > 1 else _split_ia3)(own, shapes, module, config, settings)


def _check_shapes(name: str, tensors: list[Tensor], shape: Shape) -> None:
    if len(tensors) > 1:
        a, b, *lengths = tensors
        fits = a.dim() == b.dim() == 2 and (a.shape[1], b.shape[0]) == (shape.inputs, shape.outputs)
        fits = fits and a.shape[0] == b.shape[1] and all(t.shape == (shape.outputs,) for t in lengths)
    else:
        fits = tensors[0].shape in ((1, shape.inputs), (shape.outputs, 1))
    if not fits:
        raise FlextronError(f"the adapter of {name} has other sizes than the model; it is for another checkpoint")


def _split_lora(
    own: list[Tensor], shapes: list[Shape], module: Module, config: DecoderConfig, settings: Mapping[str, Any]
) -> list[Bypass]:
    a, b, *lengths = own
    rank = a.shape[0]
    scale = scale_of(settings, module.name, rank)
    sizes = [s.outputs for s in shapes]
    of_rows = [module.rows.split(t, sizes, config.head_dim) for t in (b, *lengths)]
    parts: list[Bypass] = []
    for shape, rows, *length in zip(shapes, *of_rows, strict=True):
        lora = Lora(shape, rank, scale)
        lora.a, lora.b = (torch.nn.Parameter(t.clone().contiguous()) for t in (a.t(), rows))
        parts.append(Dora(lora, length[0].clone().contiguous()) if length else lora)
    return parts


def _split_ia3(
    own: list[Tensor], shapes: list[Shape], module: Module, config: DecoderConfig, settings: Mapping[str, Any]
) -> list[Bypass]:
    on_input = own[0].shape[0] == 1
    factors = own[0].flatten()
    sizes = [s.outputs for s in shapes]
    rows = [factors] * len(shapes) if on_input else module.rows.split(factors, sizes, config.head_dim)
    parts: list[Bypass] = []
    for shape, part in zip(shapes, rows, strict=True):
        ia3 = Ia3(shape, on_input=on_input)
        ia3.factors = torch.nn.Parameter(part.clone().contiguous())
        parts.append(ia3)
    return parts

"""Reading adapters that peft or this package wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flextron.checkpoints.peft.base import MARK, check_initialisation, order_for, reordered
from flextron.checkpoints.peft.config import check_adapter_config, is_targeted
from flextron.checkpoints.peft.layout import CONFIG, PREFIX, WEIGHTS, Module, modules_of
from flextron.errors import FlextronError, shown
from flextron.families.config import FAMILIES
from flextron.files import read_json
from flextron.model.adapter import Adapter, linear_shapes
from flextron.model.bypass import Bypass, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec

__all__ = ["read_adapter"]

_METHODS = {"LORA": ("lora_A.weight", "lora_B.weight"), "IA3": ("ia3_l",)}
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora"),
}
"""Settings that are read here, or that do not change what a trained adapter computes. Others must be unset."""
_MERGE = "merge it into a copy of its base model with peft's merge_and_unload, and convert that"
_WHY_NOT = {
    "use_dora": ": it rescales each weight by its norm, which narrower sub-networks have otherwise",
    "modules_to_save": ": it replaces whole modules, which all requests share",
}
"""Reasons, for settings that many adapters have."""


def read_adapter(directory: Path, config: DecoderConfig, widths: SubnetSpec | None = None) -> Adapter:
    """Read an adapter that peft or `write_adapter` wrote.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        config: config of the decoder that the adapter is for.
        widths: what that decoder's checkpoint holds; by default the full model.

    Raises:
        FlextronError: files are missing or damaged, do not fit the model, or ask for what has no implementation; or it
            cannot be known whether the adapter was made beside an elastic checkpoint or its original.
    """
    widths = widths or config.full_spec
    data = check_adapter_config(read_json(directory / CONFIG), str(directory / CONFIG))
    settings = _check_settings(data, directory)
    tensors, metadata = _read_tensors(directory / WEIGHTS)
    found: dict[tuple[int, str], Bypass] = {}
    for module in modules_of(config, widths):
        shapes = linear_shapes(config, widths.layers[module.layer])
        keys = [f"{PREFIX}{module.name}.{suffix}" for suffix in _METHODS[settings["peft_type"]]]
        if not all(key in tensors for key in keys):
            continue
        if not is_targeted(settings, module.name):
            raise FlextronError(
                f"the adapter in {directory} has tensors of {module.name}, which its config does not name as a target, "
                "so that peft leaves them out; restore adapter_config.json"
            )
        own = [tensors.pop(key) for key in keys]
        if not all(bool(t.isfinite().all()) for t in own):
            raise FlextronError(f"the adapter of {module.name} holds NaN or infinity; it is damaged")
        wanted = [shapes[t] for t in module.targets]
        _check_shapes(module.name, own, Shape(wanted[0].inputs, sum(s.outputs for s in wanted)))
        parts = (_split_lora if len(own) == 2 else _split_ia3)(own, wanted, module, config, settings)
        found |= {(module.layer, t): b for t, b in zip(module.targets, parts, strict=True)}
    if tensors:
        _refuse_outer(min(tensors), config)
        raise FlextronError(f"the adapter holds {min(tensors)}, which a {config.family} model has no bypass for")
    if widths == config.full_spec:
        order = order_for(directory, config, settings.get("base_model_name_or_path"), metadata.get(MARK))
        if order is not None:
            reordered(found, order, config)
    return Adapter(config, widths, lambda i, target, _: found.get((i, target)))


def _refuse_outer(name: str, config: DecoderConfig) -> None:
    """Say what is wrong with a tensor beside the embeddings or the head."""
    outer = [m.hf.removesuffix(".weight") for m in FAMILIES[config.family].tensors if "{i}" not in m.hf]
    if any(f".{module}." in name for module in outer):
        raise FlextronError(
            f"the adapter changes the embeddings or the head ({name}), which all requests share; {_MERGE}"
        )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FlextronError(f"{path} is missing or damaged ({error}); restore it") from error


def _check_settings(settings: Any, directory: Path) -> Mapping[str, Any]:
    if not isinstance(settings, dict) or settings.get("peft_type") not in _METHODS:
        raise FlextronError(f"{directory} holds no adapter of a method that is supported: {', '.join(_METHODS)}")
    for key, value in settings.items():
        if key not in _HARMLESS and value not in (None, False, "none", [], {}):
            why = _WHY_NOT.get(key, "")
            raise FlextronError(
                f"the adapter in {directory} was made with {key}, which is not supported{why}; {_MERGE}"
            )
    check_initialisation(settings, directory)
    return settings


def _check_shapes(name: str, tensors: list[Tensor], shape: Shape) -> None:
    if len(tensors) == 2:
        a, b = tensors
        fits = a.dim() == b.dim() == 2 and (a.shape[1], b.shape[0]) == (shape.inputs, shape.outputs)
        fits = fits and a.shape[0] == b.shape[1]
    else:
        fits = tensors[0].shape in ((1, shape.inputs), (shape.outputs, 1))
    if not fits:
        raise FlextronError(f"the adapter of {name} has other sizes than the model; it is for another checkpoint")


def _split_lora(
    own: list[Tensor], shapes: list[Shape], module: Module, config: DecoderConfig, settings: Mapping[str, Any]
) -> list[Bypass]:
    a, b = own
    rank = a.shape[0]
    if rank not in (ranks := {settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()}):
        raise FlextronError(
            f"the adapter of {module.name} has rank {rank}, its config says {shown(sorted(ranks))}; the files do not "
            "belong together"
        )
    # peft's rule: a key is a regular expression for the end of the module's name
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module.name))
    alpha = float(next(matching, settings.get("lora_alpha", 8)))
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    parts: list[Bypass] = []
    for shape, rows in zip(shapes, module.rows.split(b, [s.outputs for s in shapes], config.head_dim), strict=True):
        lora = Lora(shape, rank, scale)
        lora.a, lora.b = (torch.nn.Parameter(t.clone().contiguous()) for t in (a.t(), rows))
        parts.append(lora)
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

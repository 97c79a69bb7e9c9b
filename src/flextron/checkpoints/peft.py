"""Adapters on disk, as peft lays them out: `adapter_config.json` and `adapter_model.safetensors`.

An adapter belongs to the checkpoint that it was trained beside: the elastic one, whose neurons and groups are permuted
and which stock `transformers` loads, an extracted sub-network's, or the original, into whose order it is put when it is
read (`flextron.checkpoints.peft_base`). Families that fuse q, k and v in one linear have
one bypass for it in peft's layout and three here. Reading gives the three the same A. Writing joins three equal As
again, and stacks different ones, which multiplies the rank but not what the adapter computes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextron.checkpoints.families import FAMILIES, TensorMap
from flextron.checkpoints.peft_base import MARK, check_initialisation, mark_of, order_for, reordered
from flextron.checkpoints.peft_config import check_adapter_config, is_targeted
from flextron.errors import FlextronError
from flextron.files import new_directory, read_json
from flextron.model.adapter import Adapter, linear_shapes
from flextron.model.bypass import Bypass, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec

__all__ = ["read_adapter", "write_adapter"]

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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


@dataclass(frozen=True, slots=True)
class _Module:
    """One linear of the checkpoint, and the linears here that it holds."""

    name: str
    layer: int
    targets: tuple[str, ...]
    rows: TensorMap
    """How a tensor with a row for each output comes apart."""
    is_turned: bool
    """Whether peft is to be told that the weight is stored as (in, out)."""


def _modules(config: DecoderConfig, widths: SubnetSpec) -> Iterator[_Module]:
    """The linears of a checkpoint that holds these widths, its skipped layers left out and the others renumbered."""
    for number, i in enumerate(widths.kept_layers):
        present = linear_shapes(config, widths.layers[i])
        for m in FAMILIES[config.family].tensors:
            targets = tuple(name.split(".")[-2] for name in m.ours)
            if m.hf.endswith(".weight") and set(targets) <= set(present):
                rows = TensorMap(m.hf, m.ours, per_head=m.per_head)
                yield _Module(m.hf.format(i=number).removesuffix(".weight"), i, targets, rows, m.transposed)


def write_adapter(adapter: Adapter, directory: Path, *, base_model: str | None = None, overwrite: bool = False) -> None:
    """Write an adapter into a new directory, in one move.

    Args:
        adapter: adapter of one method, LoRA or IA3.
        directory: to make.
        base_model: name of the checkpoint that the adapter is for, for `adapter_config.json`.
        overwrite: whether to replace an existing directory.

    Raises:
        FlextronError: the directory exists, the disk is full, or the adapter mixes methods.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    inputs: set[str] = set()
    names: list[str] = []
    turned = False
    kinds = {type(b) for i in adapter.adapted_layers for b in adapter.at(i).values()}
    if len(kinds) != 1:
        raise FlextronError("an adapter with several methods has no place in peft's layout; use one method")
    modules = list(_modules(adapter.config, adapter.widths))
    every = [m.name for m in modules]
    for module in modules:
        own = {t: adapter.at(module.layer)[t] for t in module.targets if t in adapter.at(module.layer)}
        if not own:
            continue
        names.append(module.name)
        turned |= module.is_turned
        shapes = linear_shapes(adapter.config, adapter.widths.layers[module.layer])
        wanted = [shapes[t] for t in module.targets]
        if kinds == {Lora}:
            a, b, alphas[module.name] = _join_lora([own.get(t) for t in module.targets], wanted, module, adapter.config)
            ranks[module.name] = a.shape[1]
            written = {"lora_A.weight": a.t(), "lora_B.weight": b}
        else:
            factors, on_input = _join_ia3([own.get(t) for t in module.targets], wanted, module, adapter.config)
            inputs |= {module.name} if on_input else set()
            written = {"ia3_l": factors[None, :] if on_input else factors[:, None]}
        # a copy: peft's modules share no memory, and safetensors refuses tensors that do
        tensors |= {f"{_PREFIX}{module.name}.{key}": t.detach().clone().contiguous() for key, t in written.items()}
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "target_modules": _short(every, names, inputs),
        "task_type": "CAUSAL_LM",
    }
    if kinds == {Lora}:
        rank, alpha = ranks[names[0]], alphas[names[0]]
        config |= {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
        config["rank_pattern"] = {name: r for name, r in ranks.items() if r != rank}
        config["alpha_pattern"] = {name: a for name, a in alphas.items() if a != alpha}
    else:
        config |= {"peft_type": "IA3", "feedforward_modules": _short(every, inputs, inputs)}
    with new_directory(directory, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"} | mark_of(adapter.config, adapter.widths))
        temporary.joinpath(_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _short(every: Collection[str], names: Collection[str], inputs: Collection[str]) -> list[str]:
    """Names of modules, by their last parts where these name no others."""
    out = set()
    for name in names:
        last = name.rsplit(".", 1)[-1]
        same = [n for n in every if n.rsplit(".", 1)[-1] == last]
        are_alike = set(same) <= set(names) and len(set(same) & set(inputs)) in (0, len(same))
        out.add(last if are_alike else name)
    return sorted(out)


def _join_lora(
    parts: list[Bypass | None], shapes: list[Shape], module: _Module, config: DecoderConfig
) -> tuple[Tensor, Tensor, float]:
    """A (in, r), B (out, r) and alpha of the bypasses in one linear of the checkpoint."""
    loras = [p for p in parts if isinstance(p, Lora)]
    first = loras[0]
    if all(p.a.shape == first.a.shape and torch.equal(p.a, first.a) and p.scale == first.scale for p in loras):
        rows = [
            first.b.new_zeros(s.outputs, first.rank) if not isinstance(p, Lora) else p.b
            for p, s in zip(parts, shapes, strict=True)
        ]
        return first.a, module.rows.join(rows, config.head_dim), first.scale * first.rank
    # different As side by side; each part of B reads its own
    rank, start, rows = sum(p.rank for p in loras), 0, []
    for p, shape in zip(parts, shapes, strict=True):
        b = first.b.new_zeros(shape.outputs, rank)
        if isinstance(p, Lora):
            b[:, start : start + p.rank] = p.b.detach() * (p.scale / first.scale)
            start += p.rank
        rows.append(b)
    return torch.cat([p.a for p in loras], 1), module.rows.join(rows, config.head_dim), first.scale * rank


def _join_ia3(
    parts: list[Bypass | None], shapes: list[Shape], module: _Module, config: DecoderConfig
) -> tuple[Tensor, bool]:
    """Factors of one linear of the checkpoint, and whether they are of its inputs."""
    own = [p for p in parts if isinstance(p, Ia3)]
    first = own[0]
    if any(p.on_input for p in own):
        if len(own) < len(parts) or not all(p.on_input and torch.equal(p.factors, first.factors) for p in own):
            raise FlextronError(f"{module.name} is one linear in peft's layout; its parts need equal input factors")
        return first.factors, True
    rows = [
        first.factors.new_ones(s.outputs) if not isinstance(p, Ia3) else p.factors
        for p, s in zip(parts, shapes, strict=True)
    ]
    return module.rows.join(rows, config.head_dim), False


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
    data = check_adapter_config(read_json(directory / _CONFIG), str(directory / _CONFIG))
    settings = _check_settings(data, directory)
    tensors, metadata = _read_tensors(directory / _WEIGHTS)
    found: dict[tuple[int, str], Bypass] = {}
    for module in _modules(config, widths):
        shapes = linear_shapes(config, widths.layers[module.layer])
        keys = [f"{_PREFIX}{module.name}.{suffix}" for suffix in _METHODS[settings["peft_type"]]]
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
    own: list[Tensor], shapes: list[Shape], module: _Module, config: DecoderConfig, settings: Mapping[str, Any]
) -> list[Bypass]:
    a, b = own
    rank = a.shape[0]
    if rank not in (ranks := {settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()}):
        raise FlextronError(
            f"the adapter of {module.name} has rank {rank}, its config says {sorted(ranks)}; the files do not belong "
            "together"
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
    own: list[Tensor], shapes: list[Shape], module: _Module, config: DecoderConfig, settings: Mapping[str, Any]
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

"""Writing adapters as peft does."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flextron.checkpoints.peft.base import mark_of
from flextron.checkpoints.peft.layout import CONFIG, PREFIX, WEIGHTS, Module, modules_of
from flextron.errors import FlextronError
from flextron.files import new_directory
from flextron.model.adapter import Adapter, linear_shapes
from flextron.model.bypass import Bypass, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig

__all__ = ["write_adapter"]


def write_adapter(adapter: Adapter, directory: Path, *, base_model: str | None = None, overwrite: bool = False) -> None:
    """Write an adapter into a new directory, in one move.

    Args:
        adapter: adapter of one method, LoRA or IA3.
        directory: to make.
        base_model: name of the checkpoint that the adapter is for, for `adapter_config.json`.
        overwrite: whether to replace an existing directory.

    Raises:
        FlextronError: the directory exists, the disk is full, or the adapter mixes methods, is of another, or changes
            the embedding or the head.
    """
    adapter.check_inner("written")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    inputs: set[str] = set()
    names: list[str] = []
    turned = False
    kinds = {type(b) for i in adapter.adapted_layers for b in adapter.at(i).values()}
    if kinds not in ({Lora}, {Ia3}):
        raise FlextronError("an adapter is written in peft's layout if all of it is LoRA or all IA3; use one of these")
    modules = list(modules_of(adapter.config, adapter.widths))
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
        tensors |= {f"{PREFIX}{module.name}.{key}": t.detach().clone().contiguous() for key, t in written.items()}
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
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"} | mark_of(adapter.config, adapter.widths))
        temporary.joinpath(CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    parts: list[Bypass | None], shapes: list[Shape], module: Module, config: DecoderConfig
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
    parts: list[Bypass | None], shapes: list[Shape], module: Module, config: DecoderConfig
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

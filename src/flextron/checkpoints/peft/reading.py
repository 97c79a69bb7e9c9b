"""Reading adapters that peft or this package wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flextron.checkpoints.peft.base import MARK, check_initialisation, order_for, reordered
from flextron.checkpoints.peft.config import check_adapter_config
from flextron.checkpoints.peft.layout import CONFIG, PREFIX, WEIGHTS, modules_of
from flextron.checkpoints.peft.outer import MERGE, needed_weights, read_outer
from flextron.checkpoints.peft.parts import MAGNITUDES, bypasses_of, check_targeted, take
from flextron.errors import FlextronError
from flextron.files import read_json
from flextron.model.adapter import Adapter, linear_shapes
from flextron.model.bypass import Bypass, Dora
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.nested import Contraction

__all__ = ["read_adapter"]

_METHODS = {"LORA": ("lora_A.weight", "lora_B.weight"), "IA3": ("ia3_l",)}
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora", "use_dora", "modules_to_save", "ensure_weight_tying"),
}
"""Settings that are read here, or that do not change what a trained adapter computes. Others must be unset."""


def read_adapter(directory: Path, decoder: Decoder | DecoderConfig) -> Adapter:
    """Read an adapter that peft or `write_adapter` wrote.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        decoder: what the adapter is for; an extracted one holds less than the full model. The config of a full one is
            enough for adapters beside its linears, without DoRA.

    Raises:
        FlextronError: files are missing or damaged, do not fit the model, or ask for what has no implementation; or it
            cannot be known whether the adapter was made beside an elastic checkpoint or its original.
    """
    base = decoder if isinstance(decoder, Decoder) else None
    config, widths = (
        (decoder, decoder.full_spec) if isinstance(decoder, DecoderConfig) else (decoder.config, decoder.widths)
    )
    data = check_adapter_config(read_json(directory / CONFIG), str(directory / CONFIG))
    settings = _check_settings(data, directory)
    tensors, metadata = _read_tensors(directory / WEIGHTS)
    outer = read_outer(tensors, settings, directory, config, base)
    found: dict[tuple[int, str], Bypass] = {}
    for module in modules_of(config, widths):
        shapes = linear_shapes(config, widths.layers[module.layer])
        keys = [f"{PREFIX}{module.name}.{suffix}" for suffix in _METHODS[settings["peft_type"]]]
        if settings.get("use_dora"):
            keys.append(f"{PREFIX}{module.name}.{MAGNITUDES}")
        own = take(tensors, keys)
        if own is None:
            continue
        check_targeted(settings, module.name, directory)
        parts = bypasses_of(own, [shapes[t] for t in module.targets], module, config, settings)
        found |= {(module.layer, t): b for t, b in zip(module.targets, parts, strict=True)}
    if tensors:
        raise FlextronError(
            f"the adapter holds {min(tensors)}, for which a {config.family} model has no place beside its linears, "
            f"embedding and head; {MERGE}"
        )
    if widths == config.full_spec:
        order = order_for(directory, config, settings.get("base_model_name_or_path"), metadata.get(MARK))
        if order is not None:
            reordered(found, order, config)
    _settle(found, base)
    return Adapter(config, widths, lambda i, target, _: found.get((i, target)), outer)


def _settle(found: Mapping[tuple[int, str], Bypass], base: Decoder | None) -> None:
    """Compare DoRA's lengths with those of the decoder's own rows."""
    for (layer, target), bypass in found.items():
        if isinstance(bypass, Dora):
            half = "attention" if target in "qkvo" else "mlp"
            linear: Any = needed_weights(base).get_submodule(f"layers.{layer}.{half}.{target}")
            weight = linear.weight.t() if isinstance(linear, Contraction) else linear.weight
            bypass.settle(weight.detach().cpu(), None if linear.bias is None else linear.bias.detach().cpu())


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
            raise FlextronError(f"the adapter in {directory} was made with {key}, which is not supported; {MERGE}")
    check_initialisation(settings, directory)
    return settings

"""A sub-network as a directory of DeciLM's form (Nemotron-NAS), which vLLM runs as `DeciLMForCausalLM`.

`config.json` has one entry a layer, `block_configs`. vLLM reads an MLP's width of any size there, and whether a layer
lacks its attention or its MLP. The number of query heads is one for all layers, and the first layer must have
attention, because its MLP's norm expects a residual (vLLM's `nemotron_nas.py`). The class of the config is not part of
`transformers`, so its few lines are written beside the weights, and whoever loads them says `trust_remote_code`.
Programs that know widths only as multiples of 256 (`ffn_mult`) get them so where that is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flextron.checkpoints.weights import write_files
from flextron.errors import FlextronError
from flextron.export.format import Order
from flextron.export.huggingface import DIRECTORY_PRECISIONS, generation_config_of, write_card
from flextron.export.source import Source
from flextron.export.traits import unusual_traits
from flextron.files import new_directory
from flextron.model.config import DecoderConfig, Rope
from flextron.model.decoder import Decoder
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["NemotronNas"]

_FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose layers are Llama's, but for biases."""
_ARCHITECTURE = "DeciLMForCausalLM"
_MULTIPLE = 256
_CODE_FILE, _CODE = (
    "configuration_decilm.py",
    '''\
"""The configuration of a model whose layers differ: one entry of `block_configs` a layer."""

from transformers import PretrainedConfig


class Block(dict):
    """A dictionary whose entries are attributes, too; those that are missing do not exist."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(
        self, block_configs=None, max_position_embeddings=2048, rope_parameters=None, rope_scaling=None, **kwargs
    ):
        self.block_configs = [
            Block(attention=Block(block["attention"]), ffn=Block(block["ffn"])) for block in block_configs or []
        ]
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters
        super().__init__(**kwargs)
        # transformers 5 keeps it in rope_parameters alone
        if not hasattr(PretrainedConfig, "standardize_rope_params"):
            self.rope_scaling = rope_scaling
''',
)
_USAGE = "vllm serve PATH --trust-remote-code"


@dataclass(frozen=True, slots=True)
class NemotronNas:
    """The format `nemotron-nas`."""

    name: str = "nemotron-nas"
    suffix: str = ""
    precisions: tuple[str, ...] = ("bfloat16", "float32", "float16")

    def widths(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """The sub-network's own, with zeros for the attention of a first layer that has none.

        Raises:
            FlextronError: the family is another's, or the number of heads differs from layer to layer.
        """
        _check_family(config)
        groups = {layer.num_groups for layer in spec.layers if layer.num_groups} or {1}
        if len(groups) > 1:
            raise FlextronError(
                f"nemotron-nas has one number of query heads for all layers, and the sub-network's layers have from "
                f"{min(groups)} to {max(groups)} groups"
            )
        return _with_groups(spec, groups.pop(), every_layer=False)

    def padded(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """Its own MLP widths, and in all layers with attention as many groups as the widest has."""
        _check_family(config)
        return _with_groups(spec, max(*spec.num_groups, 1), every_layer=True)

    def notes(self, config: DecoderConfig) -> tuple[str, ...]:
        """Nothing is lost."""
        return ()

    def write(self, decoder: Decoder, source: Source, order: Order) -> str:
        """Write the directory; returns the name of vLLM's class."""
        with new_directory(order.path, overwrite=order.overwrite) as temporary:
            write_files(
                decoder.to(DIRECTORY_PRECISIONS[order.precision]),
                temporary,
                _config(decoder, source.hf_config, order.precision),
                tokenizer=source.tokenizer,
                generation_config=generation_config_of(source),
            )
            (temporary / _CODE_FILE).write_text(_CODE, encoding="utf-8")
            write_card(temporary, source, order, library="vllm", usage=_USAGE)
        return _ARCHITECTURE


def _check_family(config: DecoderConfig) -> None:
    if config.family not in _FAMILIES or config.activation != "silu":
        raise FlextronError(
            f"nemotron-nas holds models of {', '.join(_FAMILIES)} with silu, not {config.family} with "
            f"{config.activation}"
        )
    if unusual := unusual_traits(config):
        raise FlextronError(f"nemotron-nas is written without {unusual[0]}, which the model has")
    if config.sliding_window is not None:
        raise FlextronError(
            f"nemotron-nas is run without the sliding window of {config.sliding_window} tokens that the model has"
        )


def _with_groups(spec: SubnetSpec, groups: int, *, every_layer: bool) -> SubnetSpec:
    """The spec with as many groups in its first layer, and in all others that have attention (`every_layer`)."""
    first = spec.kept_layers[0]
    return SubnetSpec(
        layers=tuple(
            LayerSpec(
                intermediate_size=layer.intermediate_size,
                num_groups=groups if i == first or (every_layer and layer.num_groups) else layer.num_groups,
            )
            for i, layer in enumerate(spec.layers)
        )
    )


def _config(decoder: Decoder, hf_config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """`config.json`."""
    config, widths = decoder.config, decoder.widths
    layers = [widths.layers[i] for i in widths.kept_layers]
    groups = layers[0].num_groups
    heads = groups * config.query_rows_per_group // config.head_dim
    kv_heads = config.kv_rows(groups) // config.head_dim
    in_multiples = all(layer.intermediate_size % _MULTIPLE == 0 for layer in layers)
    assert config.rope is not None
    return {
        "architectures": [_ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{_CODE_FILE.removesuffix('.py')}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "dtype": precision,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.output_bias,
        "qkv_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_rope(config.rope),
        **{key: hf_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "block_configs": [_block(config, layer, heads // kv_heads, in_multiples) for layer in layers],
    }


def _rope(rope: Rope) -> dict[str, Any]:
    """Rotary settings by the names of `transformers` 4 and 5."""
    scaling = None if rope.scaling is None else dict(rope.scaling)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default"} | (scaling or {}) | {"rope_theta": rope.theta},
    }


def _block(config: DecoderConfig, layer: LayerSpec, heads_in_group: int, in_multiples: bool) -> dict[str, Any]:
    width = layer.intermediate_size
    ffn: dict[str, Any] = {"no_op": width == 0, "replace_with_linear": False, "intermediate_size": width or None}
    if in_multiples:
        # read as int(2 ffn_mult hidden_size / 3), rounded up to a multiple of 256
        ffn["ffn_mult"] = 1.5 * width / config.hidden_size if width else None
    attention = {
        "no_op": layer.num_groups == 0,
        "replace_with_linear": False,
        "n_heads_in_group": heads_in_group if layer.num_groups else None,
    }
    return {"attention": attention, "ffn": ffn}

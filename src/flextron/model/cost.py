"""What a sub-network weighs: parameters, bytes and floating-point operations, counted from shapes."""

from __future__ import annotations

from flextron.model.config import DecoderConfig
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["block_parameters", "kv_bytes_per_token", "layer_parameters", "num_parameters", "step_flops"]


def layer_parameters(config: DecoderConfig, layer: LayerSpec) -> int:
    """Parameters of one layer of the given widths, norms included."""
    size, norm = config.hidden_size, config.hidden_size * (2 if config.norm == "layer" else 1)
    total = 0
    norms = norm * (config.pre_norm + config.post_norm)
    if layer.num_groups:
        rows, kv_rows = layer.num_groups * config.query_rows_per_group, config.kv_rows(layer.num_groups)
        total += norms + 2 * size * (rows + kv_rows)
        total += config.qkv_bias * (rows + 2 * kv_rows) + config.output_bias * size
        total += {None: 0, "head": 2 * config.head_dim, "width": rows + kv_rows}[config.qk_norm]
    if layer.intermediate_size:
        projections = 3 if config.gated else 2
        total += norms + projections * size * layer.intermediate_size
        total += config.mlp_bias * ((projections - 1) * layer.intermediate_size + size)
    return total


def block_parameters(config: DecoderConfig, spec: SubnetSpec) -> int:
    """Parameters of the layers alone, without embeddings, head and final norm."""
    return sum(layer_parameters(config, layer) for layer in spec.layers)


def num_parameters(config: DecoderConfig, spec: SubnetSpec) -> int:
    """All parameters of a sub-network, embeddings and head (once where tied) included."""
    tables = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    tables += config.max_position_embeddings if config.rope is None else 0
    final_norm = config.hidden_size * (2 if config.norm == "layer" else 1)
    return block_parameters(config, spec) + tables * config.hidden_size + final_norm


def kv_bytes_per_token(config: DecoderConfig, spec: SubnetSpec, bytes_per_value: int = 4) -> int:
    """Bytes of keys and values that one token of context takes."""
    return sum(2 * config.kv_rows(layer.num_groups) * bytes_per_value for layer in spec.layers)


def step_flops(config: DecoderConfig, spec: SubnetSpec, *, num_sequences: int, length: int) -> int:
    """Floating-point operations of the layers' products in one forward and backward pass over padded sequences.

    A product of a forward pass comes twice more in the backward; causal attention is counted at half its square.
    """
    matrices = 0
    attention = 0
    for layer in spec.layers:
        rows, kv_rows = layer.num_groups * config.query_rows_per_group, config.kv_rows(layer.num_groups)
        matrices += 2 * config.hidden_size * (rows + kv_rows)
        matrices += (3 if config.gated else 2) * config.hidden_size * layer.intermediate_size
        attention += 2 * rows * length // 2
    return 3 * 2 * num_sequences * length * (matrices + attention)

"""The architectures of llama.cpp that a sub-network can be written as, as data, and what each of them can hold.

A uniform sub-network goes by its family's own architecture. Most of these size all layers by the first one. Two take
one entry a layer: `deci` (made for DeciLM and Nemotron-NAS), which is a Llama in all else, and `openelm`, which
normalises queries and keys as Qwen3 does. What their loaders do and do not read (`src/models/*.cpp` of the llama.cpp in
llama-cpp-python 0.3.36):

- `deci` drops a layer's attention with its MLP where `feed_forward_length` is 0, and takes the head size to be 0 where
  the first layer has no heads. So a skipped MLP, and a skipped attention of the first layer, are written as zeros.
- `openelm` has no layers without heads, no biases, no factors of rotary frequencies, and no head of its own.
- `qwen2`, `gpt2` and `gptneox` insist that heads x head size is the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flextron.errors import FlextronError
from flextron.export.traits import unusual_traits
from flextron.export.widen import FILL
from flextron.model.config import DecoderConfig
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["Architecture", "architecture_for", "own_architecture"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What llama.cpp reads under one name."""

    name: str
    activation: str
    """The one that its code computes."""
    biases: frozenset[str] = frozenset()
    """The linears whose biases it reads: `qkv`, `output` and `mlp`."""
    needs_attention_biases: bool = False
    """Whether it refuses files without the attention's biases, which a model of the family may not have."""
    has_layers: bool = False
    """Whether widths may differ from layer to layer."""
    can_skip_attention: bool = False
    """Whether layers after the first may have no heads."""
    is_interleaved: bool = False
    """Whether neighbouring dimensions of a head are rotated together, rather than opposite ones."""
    is_fused: bool = False
    """Whether queries, keys and values are one tensor."""
    fills_hidden: bool = False
    """Whether heads x head size must be the hidden size."""
    has_head: bool = True
    """Whether the head may differ from the embedding."""
    needs_head: bool = False
    """Whether a head must be written even if it is the embedding."""
    has_frequencies: bool = True
    """Whether it reads a factor for each rotary frequency (Llama 3)."""


_ALL = frozenset({"qkv", "output", "mlp"})
_LLAMA = Architecture(name="llama", activation="silu", biases=_ALL, is_interleaved=True)
_DECI = Architecture(
    name="deci", activation="silu", biases=_ALL, is_interleaved=True, has_layers=True, can_skip_attention=True
)
_QWEN2 = Architecture(
    name="qwen2", activation="silu", biases=frozenset({"qkv"}), fills_hidden=True, has_frequencies=False
)  # fmt: skip
_QWEN3 = Architecture(name="qwen3", activation="silu", has_frequencies=False)
_OPENELM = Architecture(
    name="openelm", activation="silu", has_layers=True, is_fused=True, has_head=False, has_frequencies=False
)
_GPT2 = Architecture(name="gpt2", activation="gelu_new", biases=_ALL, is_fused=True, fills_hidden=True)
_NEOX = Architecture(
    name="gptneox", activation="gelu", biases=_ALL, needs_attention_biases=True, is_fused=True, fills_hidden=True,
    needs_head=True, has_frequencies=False,
)  # fmt: skip
_ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    # a Qwen2 with fewer heads is a Llama with biases
    "qwen2": (_QWEN2, _LLAMA, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
    "gpt2": (_GPT2,),
    "gpt_neox": (_NEOX,),
}
"""Architectures by family; its own comes first."""


def own_architecture(config: DecoderConfig) -> Architecture:
    """The architecture of whole models of the family.

    Raises:
        FlextronError: the family has none.
    """
    return _known(config)[0]


def architecture_for(config: DecoderConfig, spec: SubnetSpec) -> tuple[Architecture, SubnetSpec]:
    """The architecture that holds a sub-network, and the widths as it is written there.

    Raises:
        FlextronError: none does; says why.
    """
    refusal = ""
    for architecture in _known(config):
        refusal = next(_obstacles(architecture, config, spec), "")
        if not refusal:
            return architecture, _filled(architecture, spec)
    raise FlextronError(f"llama.cpp has no {config.family} architecture for this sub-network: {refusal}")


def _known(config: DecoderConfig) -> tuple[Architecture, ...]:
    if config.family not in _ARCHITECTURES:
        raise FlextronError(
            f"{config.family} models are not written as GGUF; export to hf and use llama.cpp's convert_hf_to_gguf.py"
        )
    return _ARCHITECTURES[config.family]


def _obstacles(architecture: Architecture, config: DecoderConfig, spec: SubnetSpec) -> Iterator[str]:
    """Why an architecture cannot hold a sub-network, one reason after the other."""
    name = architecture.name
    if not architecture.has_layers and not spec.is_uniform:
        yield f"{name} wants equal widths in all layers"
    if config.activation != architecture.activation:
        yield f"{name} computes {architecture.activation}, the model {config.activation}"
    has = {"qkv": config.qkv_bias, "output": config.output_bias, "mlp": config.mlp_bias}
    if extra := sorted(part for part, is_there in has.items() if is_there and part not in architecture.biases):
        yield f"{name} has no place for the biases of {', '.join(extra)}"
    if not architecture.has_head and not config.tie_word_embeddings:
        yield f"{name} has no head apart from the embedding"
    if unusual := unusual_traits(config):
        yield f"{name} is written without {unusual[0]}"
    kind = "default" if config.rope is None or config.rope.scaling is None else config.rope.scaling["rope_type"]
    if kind not in ("default", "linear", *(["llama3"] if architecture.has_frequencies else [])):
        yield f"{name} is written without rope scaling of type {kind}"
    if architecture.fills_hidden and spec.is_uniform:
        rows = spec.layers[spec.kept_layers[0]].num_groups * config.query_rows_per_group
        if rows != config.hidden_size:
            yield f"{name} wants heads that make up the hidden size {config.hidden_size}, not {rows}"


def _filled(architecture: Architecture, spec: SubnetSpec) -> SubnetSpec:
    """Widths with zeros for the skipped halves that the architecture does not know."""
    first = spec.kept_layers[0]
    layers = []
    for i, layer in enumerate(spec.layers):
        neurons, groups = layer.intermediate_size, layer.num_groups
        if not layer.is_skipped:
            neurons = neurons or FILL
            groups = groups or (0 if architecture.can_skip_attention and i != first else 1)
        layers.append(LayerSpec(intermediate_size=neurons, num_groups=groups))
    return SubnetSpec(layers=tuple(layers))

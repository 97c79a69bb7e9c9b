"""The architectures of llama.cpp that a sub-network can be written as, as data, and what each of them can hold.

A uniform sub-network goes by its family's own architecture. Most of these size all layers by the first one. Two take
one entry a layer: `deci` (made for DeciLM and Nemotron-NAS), which is a Llama in all else, and `openelm`, which
normalises queries and keys as Qwen3 does. What their loaders do and do not read (`src/models/*.cpp` of the llama.cpp in
llama-cpp-python 0.3.36):

- `deci` drops a layer's attention with its MLP where `feed_forward_length` is 0, and takes the head size to be 0 where
  the first layer has no heads. So a skipped MLP, and a skipped attention of the first layer, are written as zeros.
- `openelm` has no layers without heads, no biases, no factors of rotary frequencies, and no head of its own.
- `qwen2`, `gpt2`, `gptneox`, `phi3`, `olmo2` and `stablelm` insist that heads x head size is the hidden size.
- `gemma2` and `gemma3` scale scores by the head size, but for their largest models, which they know by the number of
  layers; `smollm3` rotates all layers but each fourth.
"""

from __future__ import annotations

import math
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
    scalings: frozenset[str] = frozenset({"linear"})
    """Kinds of rope scaling that it reads."""
    traits: frozenset[str] = frozenset()
    """Traits of `DecoderConfig` that it has, beside those of a plain decoder."""
    has_windows: bool = False
    """Whether layers may have a sliding window."""
    rotates_part: bool = False
    """Whether it can rotate a part of each head."""
    largest: int | None = None
    """The number of layers at which it scales scores by hidden size over heads (Gemma)."""
    rotates_but_each: int | None = None
    """The last of so many layers is the one that is not rotated (SmolLM3)."""


_ALL = frozenset({"qkv", "output", "mlp"})
_BY_FREQUENCY = frozenset({"linear", "llama3"})
_LLAMA = Architecture(name="llama", activation="silu", biases=_ALL, is_interleaved=True, scalings=_BY_FREQUENCY)
_DECI = Architecture(
    name="deci", activation="silu", biases=_ALL, is_interleaved=True, has_layers=True, can_skip_attention=True,
    scalings=_BY_FREQUENCY,
)  # fmt: skip
_QWEN2 = Architecture(name="qwen2", activation="silu", biases=frozenset({"qkv"}), fills_hidden=True)
_QWEN3 = Architecture(name="qwen3", activation="silu")
_OPENELM = Architecture(name="openelm", activation="silu", has_layers=True, is_fused=True, has_head=False)
_GPT2 = Architecture(name="gpt2", activation="gelu_new", biases=_ALL, is_fused=True, fills_hidden=True)
_NEOX = Architecture(
    name="gptneox", activation="gelu", biases=_ALL, needs_attention_biases=True, is_fused=True, fills_hidden=True,
    needs_head=True, rotates_part=True,
)  # fmt: skip
_GEMMA_TRAITS = frozenset({"norm_offset", "post_norm", "embedding_scale", "attention_scale", "logits_cap"})
_GEMMA2 = Architecture(
    name="gemma2", activation="gelu_pytorch_tanh", has_head=False, has_windows=True, largest=46,
    traits=_GEMMA_TRAITS | {"attention_cap"},
)  # fmt: skip
_GEMMA3 = Architecture(
    name="gemma3", activation="gelu_pytorch_tanh", has_windows=True, largest=62, traits=_GEMMA_TRAITS | {"layer_ropes"}
)
_SMOLLM3 = Architecture(
    name="smollm3", activation="silu", biases=frozenset({"qkv"}), is_interleaved=True, rotates_but_each=4,
    traits=frozenset({"layer_ropes"}),
)  # fmt: skip
_PHI3 = Architecture(
    name="phi3", activation="silu", is_fused=True, fills_hidden=True, rotates_part=True,
    scalings=frozenset({"linear", "longrope"}),
)  # fmt: skip
_GRANITE = Architecture(
    name="granite", activation="silu", biases=_ALL, is_interleaved=True, scalings=_BY_FREQUENCY,
    traits=frozenset({"attention_scale", "embedding_scale", "residual_scale", "logits_scale"}),
)  # fmt: skip
_OLMO2 = Architecture(
    name="olmo2", activation="silu", biases=frozenset({"qkv"}), fills_hidden=True, needs_head=True,
    traits=frozenset({"pre_norm", "post_norm"}), scalings=frozenset(),
)  # fmt: skip
_STABLELM = Architecture(
    name="stablelm", activation="silu", biases=frozenset({"qkv"}), fills_hidden=True, needs_head=True, rotates_part=True
)
_ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    # a Qwen2 with fewer heads is a Llama with biases
    "qwen2": (_QWEN2, _LLAMA, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
    "gpt2": (_GPT2,),
    "gpt_neox": (_NEOX,),
    "gemma2": (_GEMMA2,),
    "gemma3_text": (_GEMMA3,),
    "smollm3": (_SMOLLM3,),
    # a Phi-3 that rotates whole heads is a Llama
    "phi3": (_PHI3, _LLAMA, _DECI),
    "granite": (_GRANITE,),
    "olmo2": (_OLMO2,),
    "stablelm": (_STABLELM,),
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
    # windows that an architecture has not shorten the context instead
    if unusual := [t for t in unusual_traits(config) if t not in architecture.traits | {"layer_windows"}]:
        yield f"{name} is written without {unusual[0]}"
    yield from _rotary_obstacles(architecture, config, spec)
    rows = max(layer.num_groups for layer in spec.layers) * config.query_rows_per_group
    if architecture.fills_hidden and spec.is_uniform and rows != config.hidden_size:
        yield f"{name} wants heads that make up the hidden size {config.hidden_size}, not {rows}"
    if architecture.largest is not None:
        yield from _gemma_obstacles(architecture, config, spec, rows // config.head_dim)


def _rotary_obstacles(architecture: Architecture, config: DecoderConfig, spec: SubnetSpec) -> Iterator[str]:
    name, ropes = architecture.name, [config.rope_of(i) for i in spec.kept_layers]
    for rope in {id(rope): rope for rope in ropes if rope is not None}.values():
        kind = "default" if rope.scaling is None else rope.scaling["rope_type"]
        if kind != "default" and kind not in architecture.scalings:
            yield f"{name} is written without rope scaling of type {kind}"
        if rope.fraction != 1 and not architecture.rotates_part:
            yield f"{name} rotates whole heads"
    step = architecture.rotates_but_each
    if step is not None and [rope is not None for rope in ropes] != [(n + 1) % step != 0 for n in range(len(ropes))]:
        yield f"{name} rotates all layers but the last of each {step}, and the layers that are kept do not follow that"


def _gemma_obstacles(
    architecture: Architecture, config: DecoderConfig, spec: SubnetSpec, num_heads: int
) -> Iterator[str]:
    name, usual = architecture.name, config.head_dim**-0.5
    if len(spec.kept_layers) == architecture.largest:
        usual = max(1, config.hidden_size // max(1, num_heads)) ** -0.5
    if not math.isclose(config.attention_scale or config.head_dim**-0.5, usual, rel_tol=1e-6):
        yield f"{name} of {len(spec.kept_layers)} layers scales scores by {usual:.4g}, the model by another factor"
    if not math.isclose(config.embedding_scale, config.hidden_size**0.5, rel_tol=1e-6):
        yield f"{name} scales embeddings by the root of the hidden size"
    if "attention_cap" in architecture.traits and None in (config.attention_cap, config.logits_cap):
        yield f"{name} caps scores and logits"
    windows = {config.window_of(i) for i in spec.kept_layers}
    if len(windows - {None}) > 1:
        yield f"{name} has one size of windows"
    # llama.cpp ends the process where its cache for either kind would hold no layer
    if len(windows) == 1 and (None not in windows or "attention_cap" in architecture.traits):
        yield f"{name} wants a layer with a sliding window and one without among those that are kept"
    whole, local = (
        {config.rope_of(i) for i in spec.kept_layers if (config.window_of(i) is None) == is_whole}
        for is_whole in (True, False)
    )
    if len(whole) > 1 or len(local) > 1:
        yield f"{name} has one rotation for layers with a window and one for the others"
    if "layer_ropes" in architecture.traits and any(rope is not None and rope.scaling is not None for rope in local):
        yield f"{name} is written without rope scaling in layers with a window"


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

"""One grid of tiny random Hugging Face models over all families and traits, shared by the tests of model and elastic.

Every parameter is random (matrices of scale 0.2, norm weights about 1, biases not 0), so that none can be mixed up,
left out or read twice without a visible difference. Sizes differ from each other wherever a family lets them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.masking_utils import eager_mask

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

VOCAB = 67
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_positions": 64, **IDS}
NEOX: dict[str, Any] = {"num_attention_heads": 4, "max_position_embeddings": 64, "hidden_act": "gelu"}
ROPE_NEOX: dict[str, Any] = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.25}
# 16 positions originally and head size 12: some frequencies are kept, some divided, some in between
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# 16 positions originally, so that some dimensions are kept, some divided, some in between
YARN: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 4.0, "beta_slow": 0.5},
}
LONGROPE: dict[str, Any] = {
    **{"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75},
    **{"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0]},
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 24, "pad_token_id": 0, "sliding_window": 5}
FULL, SLIDING = "full_attention", "sliding_attention"

CASES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "llama-3": LlamaConfig(
        **SIZES,
        **HEADS,
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3,
    ),
    "llama-linear": LlamaConfig(
        **SIZES, **HEADS, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "llama-mqa": LlamaConfig(**SIZES | HEADS | {"num_key_value_heads": 1}),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=12, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2, n_layer=3, n_inner=40),
    "neox": GPTNeoXConfig(**SIZES, **NEOX, rope_parameters=ROPE_NEOX),
    "neox-sequential": GPTNeoXConfig(
        **SIZES,
        **NEOX | {"hidden_act": "gelu_fast"},
        rope_parameters=ROPE_NEOX | {"partial_rotary_factor": 0.5},
        use_parallel_residual=False,
    ),
    "gpt2-rescaled": GPT2Config(**GPT2, n_layer=3, scale_attn_by_inverse_layer_idx=True),
    "llama-yarn": LlamaConfig(**SIZES, **HEADS, rope_parameters=YARN),
    "qwen2-mixed": Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2": Gemma2Config(
        **SIZES,
        **HEADS,
        **GEMMA,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        **HEADS,
        **GEMMA,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "smollm3": SmolLM3Config(
        **SIZES,
        **HEADS,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=6,
        layer_types=[FULL, SLIDING, FULL],
        pad_token_id=0,
    ),
    "phi3": Phi3Config(**SIZES, **HEADS, sliding_window=7, pad_token_id=0),
    "phi3-longrope": Phi3Config(
        **SIZES | HEADS | {"max_position_embeddings": 256},
        original_max_position_embeddings=64,
        rope_parameters=LONGROPE,
        tie_word_embeddings=True,
        pad_token_id=0,
    ),
    "granite": GraniteConfig(
        **SIZES,
        **HEADS,
        embedding_multiplier=6.0,
        logits_scaling=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.2,
        attention_bias=True,
    ),
    "olmo2": Olmo2Config(**SIZES, **HEADS, attention_bias=True, pad_token_id=0),
    "olmo2-mqa": Olmo2Config(**SIZES | HEADS | {"num_key_value_heads": 1}, pad_token_id=0),
    "stablelm": StableLmConfig(**SIZES, **HEADS, use_qkv_bias=True, partial_rotary_factor=0.25),
}

MECHANISMS = (
    "llama-3",  # heads in groups, biases of all linears, a head size of its own, tied head, rescaled rotation
    "llama-mqa",  # one KV head: a group is a query head
    "gpt2-rescaled",  # learned positions, LayerNorm, no gate, scores scaled by the layer's number
    "neox",  # attention and MLP side by side, rotation of a part of each head
    "gemma2",  # norms before and after, capped scores and logits, windows in some layers, scaled embeddings
    "gemma3",  # a norm of each query and key head, a rotation of its own for layers with a window
    "smollm3",  # layers without rotation
    "granite",  # scaled residual stream, scores, embeddings and logits
    "olmo2",  # a norm of all query heads as one, no norm before
    "stablelm",  # LayerNorm with a gate, biases of q, k and v alone
)
"""Cases that have between them all that a decoder can do.

They stand for all families where a test compares the decoder with itself (other widths, other batches, adapters,
kernels): such a test sees what the decoder computes, and not from which checkpoint it came.
"""
LAYOUTS = (
    "llama",  # a tensor for each linear
    "llama-mqa",  # permutations move q and o alone
    "gpt2",  # q, k, v in one tensor, and all stored as (in, out)
    "neox",  # q, k, v in one tensor, head by head
    "phi3",  # q, k, v in one tensor, and gate, up in one
    "gemma2",  # four norms a layer, gains beside 1
    "olmo2",  # norms whose rows move with the heads
)
"""Cases that have between them all ways in which a checkpoint holds linears and norms, for tests of what goes with its
tensors and names: adapters, permutations."""


def random_model(case: str, seed: int = 3) -> PreTrainedModel:
    """The case's model with random parameters, in evaluation mode and with the plainest attention."""
    return random_from(CASES[case], seed)


def random_from(config: PretrainedConfig, seed: int = 3) -> PreTrainedModel:
    """As `random_model`, of any config."""
    torch.manual_seed(seed)
    # a copy: models write their dtype into their config, which other tests share
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            # norms of Gemma add the 1 themselves
            if parameter.dim() == 1 and name.endswith("weight") and not config.model_type.startswith("gemma"):
                parameter.add_(1)
    return model


class _ExactGemmaNorm(nn.Module):
    """Gemma's norm in the weights' precision."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


def _exact_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Attention with whole scores in the weights' precision."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if (cap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    assert mask is not None
    return (torch.softmax(scores + mask, -1) @ v).transpose(1, 2), None


AttentionInterface.register("exact", _exact_attention)
AttentionMaskInterface.register("exact", eager_mask)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout: in any dtype, stock RMS norms and eager softmax round to float32."""
    model = model.double()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.startswith("Gemma") and type(norm).__name__.endswith("RMSNorm"):
                setattr(parent, name, _ExactGemmaNorm(norm.weight, norm.eps))
            elif type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)
        if hasattr(parent, "scalar_embed_scale"):
            parent.embed_scale = torch.tensor(parent.scalar_embed_scale, dtype=torch.float64)
    model.set_attn_implementation("exact")
    return model


def hf_config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the model's `config.json` holds."""
    data: dict[str, Any] = json.loads(model.config.to_json_string())
    return data


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Our decoder with the model's weights, read from what `transformers` publishes of it."""
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_decoder(open_pretrained(directory), dtype=model.dtype)


@cache
def _read_decoder(case: str) -> Decoder:
    return decoder_of(random_model(case))


def random_decoder_of(case: str) -> Decoder:
    """`decoder_of` the case's model: a copy for each test, of what is read once."""
    return copy.deepcopy(_read_decoder(case))


def stock(directory: Path) -> PreTrainedModel:
    """What unmodified `transformers` makes of a directory; complains of weights that are missing or superfluous."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    complaints = {kind: found for kind, found in report.items() if found}
    assert not complaints, complaints
    out: PreTrainedModel = model.eval()
    return out


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    """Token ids, all different enough from each other to matter."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hf_logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """The reference's logits, (B, T, vocabulary)."""
    logits: Tensor = model(tokens_BT, use_cache=False).logits
    return logits


def our_logits(decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec | None = None) -> Tensor:
    """The decoder's logits in a sub-network (by default all that it holds), (B, T, vocabulary)."""
    logits_NV = decoder.logits(decoder(Batch.padded(tokens_BT, spec or decoder.widths)))
    return logits_NV.view(*tokens_BT.shape, -1)


def hf_greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy continuation by running the whole text again for each token: no cache that could be wrong."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(hf_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest deviation, as a fraction of the reference's largest entry."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(((ours - reference).abs().max() / reference.abs().max()).detach())

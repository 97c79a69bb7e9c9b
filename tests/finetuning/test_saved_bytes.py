"""What finetuning in chunks keeps between forward and backward, against autograd's own count for `peft`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.families.config import config_from_hf
from flextron.finetuning.example import Example
from flextron.finetuning.layerwise import Finetuning
from flextron.finetuning.units import Stage
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from tests.checkpoints.families_cases import hf_config_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LENGTH = 1024
SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BAR = 0.13
TOKENS = torch.arange(LENGTH + 1) % 1000


def bytes_saved_by_peft(model: Any, *, with_loss: bool) -> int:
    """Bytes of the distinct memory, parameters aside, that autograd holds after a forward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = TOKENS[None, :LENGTH]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if with_loss:
            out = model(tokens, labels=tokens, use_cache=False).loss
        else:
            out = model.get_base_model().model(tokens, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def most_bytes_saved(decoder: Decoder, adapter: Adapter) -> int:
    """The most bytes that are kept between any two units: those after the first one backward."""
    work = Finetuning(decoder, adapter, [Example(TOKENS, torch.ones(LENGTH + 1))])
    assert work.num_tokens == LENGTH
    kept = []
    while work.run(256):
        kept.append(work.saved.num_bytes)
        if work.stage is Stage.BACKWARD and work.num_left < LENGTH * len(adapter.layers):
            break
    return max(kept)


@pytest.mark.parametrize(
    ("num_layers", "vocab_size"), [(6, 1000), pytest.param(30, 49152, marks=pytest.mark.slow)], ids=["small", "whole"]
)
def test_at_most_13_percent_of_what_peft_keeps(num_layers: int, vocab_size: int) -> None:
    hf = LlamaConfig(**SMOLLM2_135M, num_hidden_layers=num_layers, vocab_size=vocab_size)
    model = LlamaForCausalLM(hf)
    config = config_from_hf(hf_config_of(model))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(model, lora).train()
    layers_alone = bytes_saved_by_peft(theirs, with_loss=False)
    whole = bytes_saved_by_peft(theirs, with_loss=True)
    del theirs, model

    decoder = Decoder(config).requires_grad_(False)
    adapter = Adapter.lora(config, rank=16, alpha=32)
    ours = most_bytes_saved(decoder, adapter)
    print(  # noqa: T201
        f"{num_layers} layers: peft {layers_alone} without and {whole} with head and loss, chunks {ours}: "
        f"{ours / layers_alone:.4f} and {ours / whole:.4f}"
    )
    assert ours <= BAR * layers_alone < BAR * whole

"""The simulator against the real engine in real time, on a model of some million parameters."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scale.simulated import compared
from flextron.families.config import config_from_hf
from flextron.model.decoder import Decoder


def medium_decoder() -> Decoder:
    """Larger than a processor's inner caches, so that iterations take as long after a unit of training as before."""
    torch.manual_seed(0)
    config = config_from_hf(
        {
            "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 10000.0,
        }
    )  # fmt: skip
    decoder = Decoder(config).eval().requires_grad_(False)
    for p in decoder.parameters():
        p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
    return decoder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_figures_are_within_a_tenth_of_the_engines() -> None:
    real, simulated, count = compared(medium_decoder(), 40.0)
    assert count > 50
    assert real.finetuned > 0
    assert max(simulated.distance(real).values()) <= 0.1, (real, simulated)

"""What a fingerprint tells apart, and what it does not."""

from __future__ import annotations

import pytest
import torch

from flextron.checkpoints.fingerprint import fingerprint
from tests.random_decoders import random_decoder


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_it_tells_weights_apart(case: str) -> None:
    decoder = random_decoder(case)
    found = fingerprint(decoder)
    assert found == fingerprint(random_decoder(case))
    assert found == fingerprint(random_decoder(case).to(torch.bfloat16))
    for parameter in decoder.parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.add_(torch.linspace(0.01, 0.02, parameter.numel()).view_as(parameter))
            assert fingerprint(decoder) != found
            parameter.copy_(before)
    assert fingerprint(decoder) == found


def test_it_tells_models_apart() -> None:
    assert fingerprint(random_decoder("llama")) != fingerprint(random_decoder("qwen3"))

"""Generation and latencies on a GPU run the engine's iteration; here the same steps on the CPU."""

from __future__ import annotations

import pytest
import torch

from flextron.generation.decoding import _OperatorSteps, _PagedSteps
from tests.random_decoders import ragged_specs, random_decoder


@pytest.mark.parametrize("name", ["llama", "mistral", "llama-mqa", "gemma2", "gpt2"])
def test_paged_steps_are_those_of_a_contiguous_cache(name: str) -> None:
    decoder = random_decoder(name).double()
    lengths = [[5, 19, 1], [1, 1, 1], [3, 1, 2], [1, 1, 1]]
    for spec in ragged_specs(decoder.config, 3):
        paged, other = (kind(decoder, spec, 3, 40, None) for kind in (_PagedSteps, _OperatorSteps))
        starts = [0, 0, 0]
        for own in lengths:
            new = [torch.arange(n) * 7 % 60 + start for n, start in zip(own, starts, strict=True)]
            with torch.inference_mode():
                found, wanted = paged.run(new, starts), other.run(new, starts)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
            starts = [start + n for start, n in zip(starts, own, strict=True)]

"""Steps of growing sequences, on both paths, against the decoder's pass over whole sequences."""

from __future__ import annotations

import pytest
import torch

from flextron.generation.decoding import Steps
from flextron.kernels.build import load_library
from flextron.model.batch import Batch
from tests.random_decoders import ragged_specs, random_decoder

PATHS = ["operators"] if isinstance(load_library("decoder"), str) else ["operators", "native"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_steps_agree_with_whole_sequences(path: str, name: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "operators":
        monkeypatch.setattr("flextron.generation.decoding.why_not_native", lambda _: "asked for")
    decoder = random_decoder(name)
    spec = ragged_specs(decoder.config, 3)[which]
    sequences = [torch.randint(decoder.config.vocab_size, (n,)) for n in (20, 27)]
    steps = Steps(decoder, spec, 2, 27)
    assert steps.is_native == (path == "native")
    held = [0, 0]
    # the last cut comes twice: a step may run again, as latency probes do
    for ends in ([9, 18], [10, 19], [17, 23], [20, 27], [20, 27]):
        starts = [min(a, e - 1) for a, e in zip(held, ends, strict=True)]
        logits = steps.run([s[a:e] for s, a, e in zip(sequences, starts, ends, strict=True)], starts)
        for row, s, e in zip(logits, sequences, ends, strict=True):
            wanted = decoder.logits(decoder(Batch.padded(s[None, :e], spec)))[-1]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
        held = list(ends)

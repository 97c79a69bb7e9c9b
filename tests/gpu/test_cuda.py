"""The same on a GPU: scoring, bf16 training, generation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flextron
from flextron.generation.generate import SamplingParams, generate
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from flextron.training.trainer import train
from tests.checkpoints.families_cases import random_tokens, relative_error
from tests.tiny import make_tiny_llama
from tests.toy import SPACE, prose, toy_blocks, toy_decoder, toy_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS = random_tokens(3, 11)
SPECS = [SPACE.full, SPACE.smallest, SubnetSpec.of([24, 0, 8], [1, 2, 2])]


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """`accelerate` settles device and precision once a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@torch.no_grad()
def logits(decoder: Decoder, spec: SubnetSpec) -> torch.Tensor:
    tokens = TOKENS.to(decoder.device)
    return decoder.logits(decoder(Batch.padded(tokens, spec))).cpu()


@pytest.mark.parametrize("case", ["llama", "llama-mqa", "mistral", "qwen3", "gpt2", "neox"])
def test_logits_and_greedy_tokens_are_the_cpus(case: str) -> None:
    decoder = toy_decoder(case=case)
    moved = copy.deepcopy(decoder).cuda()
    specs = [decoder.widths, SubnetSpec.of([24, 0, 8], [1, 1, 1])]
    prompts = [row.tolist() for row in TOKENS]
    for spec in specs:
        assert relative_error(logits(moved, spec), logits(decoder, spec)) < 1e-3
        ours, theirs = (generate(d, prompts, spec, SamplingParams(max_tokens=8)) for d in (moved, decoder))
        assert ours == theirs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns(precision: str) -> None:
    decoder = toy_decoder(4).cuda()
    recipe = toy_recipe(steps=60, lr=5e-3, precision=precision)
    result = train(decoder, toy_decoder(3), SPACE, toy_blocks(), recipe)
    losses = [step["loss"] for step in result.history]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(p.is_cuda and p.dtype == torch.float32 and p.isfinite().all() for p in decoder.parameters())


def test_from_a_checkpoint_to_a_target(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    texts = [prose()]
    model = flextron.convert(tmp_path / "tiny", calibration=texts, num_calibration_tokens=512, context=64)
    assert model.decoder.device.type == "cuda"
    settings = flextron.SearchSettings(targets=(0.9,), rounds=1, num_uniform=2)
    frontier = model.profile(texts, settings=settings, num_tokens=256, context=32)
    model.save(tmp_path / "elastic")
    model = flextron.load(tmp_path / "elastic")
    spec = model.select(latency=frontier.full.latency)
    text = model.generate("Once upon", spec=spec, max_tokens=6)
    assert model.extract(spec).generate("Once upon", max_tokens=6) == text
    with pytest.raises(flextron.FlextronError, match="not on this device"):
        model.to("cpu").select(latency=1.0)

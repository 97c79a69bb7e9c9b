"""The smallest things that can be trained and searched: a random Llama, a space over it, text that can be learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.routing import LatencyTable
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.recipe import TrainRecipe
from flextron.workflows.elastify import StepCallback
from tests.checkpoints.families_cases import VOCAB, decoder_of, random_model

CONTEXT = 12

SPACE = SearchSpace(
    num_hidden_layers=3,
    intermediate_sizes=(8, 24, 40),
    num_groups=(1, 2),
    skippable_layers=(1,),
    max_skipped_layers=1,
)
FULL_ONLY = SearchSpace(num_hidden_layers=3, intermediate_sizes=(40,), num_groups=(2,))


def toy_decoder(seed: int = 3, case: str = "llama") -> Decoder:
    """A random three-layer model whose space is `SPACE`."""
    return decoder_of(random_model(case, seed)).eval().requires_grad_(False)


def toy_blocks(num_blocks: int = 16, seed: int = 0) -> TokenBlocks:
    """Rows of random tokens."""
    tokens = np.random.default_rng(5).integers(0, VOCAB, (num_blocks, CONTEXT), dtype=np.int32)
    return TokenBlocks(tokens=tokens, seed=seed)


def toy_recipe(*, steps: int = 6, **changes: Any) -> TrainRecipe:
    """A recipe of that many steps, with everything that a test depends on spelled out."""
    batch_size = int(changes.get("batch_size", 4))
    values: dict[str, Any] = {
        "tokens": steps * batch_size * CONTEXT,
        "context": CONTEXT,
        "batch_size": batch_size,
        "micro_batch_size": batch_size,
        "subnets_per_batch": 2,
        "kl_weight": 1.0,
        "kl_fraction": 0.5,
        "hidden_weight": 1.0,
        "lm_weight": 0.0,
        "lr": 2e-3,
        "precision": "fp32",
    }
    return TrainRecipe(**values | changes)


def segment_logits(decoder: Decoder, tokens_BT: Tensor, spec: SubnetSpec) -> Tensor:
    """Logits of one sub-network over the whole vocabulary at once, (B, T, vocabulary), with gradients."""
    hidden: Tensor = decoder(Batch.padded(tokens_BT, spec))
    logits_ND = decoder.logits(hidden)
    return logits_ND.view(*tokens_BT.shape, -1)


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def synthetic_ms(spec: SubnetSpec) -> float:
    """Additive milliseconds, as a quiet machine would need them."""

    def layer_ms(layer: LayerSpec) -> float:
        return 0.02 * layer.intermediate_size + 0.75 * layer.num_groups

    return 1.5 + sum(map(layer_ms, spec.layers))


TABLE = LatencyTable(
    device="a-quiet-machine",
    batch_size=1,
    context=8,
    base_ms=1.5,
    mlp_ms={w: 0.02 * w for w in SPACE.intermediate_sizes},
    attention_ms={g: 0.75 * g for g in SPACE.num_groups},
    full_ms=synthetic_ms(SPACE.full),
    median_error=0.0,
    max_error=0.0,
)
"""What measuring `synthetic_ms` would give."""


def synthetic_latencies(decoder: Decoder, specs: list[SubnetSpec], **_: object) -> list[float]:
    """Stands in for `step_latencies_ms`."""
    return [synthetic_ms(spec) for spec in specs]


@dataclass
class Stages:
    """A progress display that remembers which stages opened, and may interrupt the one that opens as number `stop`."""

    stop: int | None = None
    opened: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[StepCallback]:
        if self.stop is not None and len(self.opened) == self.stop:
            raise KeyboardInterrupt
        self.opened.append(name)
        yield lambda done, total, figures=None, /: None


def prose(num_chars: int = 12_000, seed: int = 0) -> str:
    """Words in no order, enough for any tiny test."""
    words = ("once", "upon", "a", "time", "model", "learned", "to", "be", "smaller", "still", "and", "every", "layer")
    generator = np.random.default_rng(seed)
    text = " ".join(words[i] for i in generator.integers(0, len(words), num_chars // 3))
    assert len(text) >= num_chars
    return text[:num_chars]


def assert_same_training(ours: Decoder, reference: Decoder, before: dict[str, Tensor]) -> None:
    """What two runs added to the weights is the same.

    But for rounding, which depends on where tensors lie, and which AdamW amplifies where a gradient is near 0: a step
    too many or lost moments change the mean by percents.
    """
    a, b = weights_of(ours), weights_of(reference)
    moved = sum(float((b[name] - before[name]).abs().sum()) for name in before)
    apart = sum(float((a[name] - b[name]).abs().sum()) for name in before)
    assert moved > 0
    assert apart <= 2e-3 * moved


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all parameters are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

"""An order of units: what it does to weights is tested with `permute`; here its form on disk and what is refused."""

from __future__ import annotations

import pytest
import torch

from flextron.checkpoints.permutation import Permutation
from flextron.errors import FlextronError
from tests.checkpoints.families_cases import random_decoder_of


def shuffled(case: str, seed: int = 0) -> Permutation:
    """Orders at random."""
    config = random_decoder_of(case).config
    generator = torch.Generator().manual_seed(seed)
    layers = range(config.num_hidden_layers)
    return Permutation(
        neurons=tuple(torch.randperm(config.intermediate_size, generator=generator) for _ in layers),
        groups=tuple(torch.randperm(config.num_groups, generator=generator) for _ in layers),
    )


@pytest.mark.parametrize("case", ["llama", "gpt2", "llama-mqa"])
def test_it_comes_back_from_its_tensors(case: str) -> None:
    permutation = shuffled(case)
    back = Permutation.from_tensors(permutation.to_tensors())
    assert back.digest == permutation.digest != shuffled(case, 1).digest
    for ours, theirs in zip(back.neurons + back.groups, permutation.neurons + permutation.groups, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "damaged", [None, torch.zeros(40, dtype=torch.int32), torch.arange(40.0), torch.arange(40).view(2, 20)]
)
def test_what_is_no_order_is_refused(damaged: torch.Tensor | None) -> None:
    tensors: dict[str, torch.Tensor] = shuffled("llama").to_tensors()
    assert tensors["layers.1.neurons"].shape == (40,), "the sizes above are the model's"
    del tensors["layers.1.neurons"]
    with pytest.raises(FlextronError, match="permutation"):
        Permutation.from_tensors(tensors if damaged is None else tensors | {"layers.1.neurons": damaged})


@pytest.mark.parametrize("kind", ["neurons", "groups"])
def test_the_order_of_another_model_is_refused(kind: str) -> None:
    config = random_decoder_of("llama").config
    tensors = shuffled("llama").to_tensors()
    Permutation.from_tensors(tensors).check(config)
    longer = torch.arange(len(tensors[f"layers.1.{kind}"]) + 1)
    with pytest.raises(FlextronError, match="other sizes"):
        Permutation.from_tensors(tensors | {f"layers.1.{kind}": longer}).check(config)
    fewer = {name: order for name, order in tensors.items() if "layers.2." not in name}
    with pytest.raises(FlextronError, match="other sizes"):
        Permutation.from_tensors(fewer).check(config)

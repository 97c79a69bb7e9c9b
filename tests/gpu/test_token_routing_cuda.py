"""Token-level routing on a GPU: choices, outputs and training as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from flextron.generation.generate import SamplingParams, generate
from flextron.model.batch import Batch
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.training.token_routing import train_token_router
from tests.checkpoints.families_cases import random_tokens, relative_error
from tests.token_toy import STATIC, opinionated_router
from tests.toy import TABLE, toy_blocks, toy_decoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("num_sequences", [1, 3, 20])
def test_outputs_and_greedy_tokens_are_the_cpus(num_sequences: int) -> None:
    decoder, router = toy_decoder(), opinionated_router()
    moved, moved_router = copy.deepcopy(decoder).cuda(), copy.deepcopy(router).cuda()
    tokens, spec = random_tokens(num_sequences, 9), STATIC[0.8]
    with torch.no_grad():
        theirs = decoder(Batch.padded(tokens, spec, router.at(0.8, 20.0)))
        ours = moved(Batch.padded(tokens.cuda(), spec, moved_router.at(0.8, 20.0)))
    assert relative_error(ours.cpu(), theirs) < 1e-3
    prompts, params = tokens.tolist(), SamplingParams(max_tokens=8)
    expected = generate(decoder, prompts, spec, params, router.at(0.8, 20.0))
    assert generate(moved, prompts, spec, params, moved_router.at(0.8, 20.0)) == expected


def test_training_beats_the_static_subnetworks() -> None:
    decoder = toy_decoder().cuda()
    recipe = TokenRouterRecipe(batch_size=16, warm_tokens=768, warm_epochs=3, heldout_blocks=32, joint_steps=6)
    router = opinionated_router()
    result = train_token_router(decoder, decoder, router, TABLE, STATIC, toy_blocks(96), recipe)
    for target in STATIC:
        assert result.routed_kl[target] < result.static_kl[target]
        assert result.cost_ratio[target] == pytest.approx(1, abs=0.02)

"""Running requests that go on in narrower sub-networks, against a loop that keeps all keys and values itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flextron.engine import EngineCore, FinishReason, Request
from flextron.engine.speculation import Speculation
from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams, generate
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.engine.test_engine import DECODER, PATHS, SPECS, engine
from tests.random_decoders import ragged_specs, random_decoder

Parts = list[tuple[int, SubnetSpec]]
"""First positions, and the sub-networks that compute the tokens from there on."""
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


class Kept:
    """Keys and values of one sequence, which every token attends to by a plain softmax."""

    def __init__(self, decoder: Decoder) -> None:
        self.config, self.kept = decoder.config, dict[int, Tensor]()

    def __call__(
        self, layer: int, segment: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        heads, new = k_NKd.shape[1], torch.stack([k_NKd, v_NKd])
        if layer in self.kept:
            new = torch.cat([self.kept[layer][:, :, :heads], new], 1)
        self.kept[layer] = new
        rows, share = [], q_NHd.shape[1] // heads
        for n, q_Hd in enumerate(q_NHd):
            last = new.shape[1] - len(q_NHd) + n
            first = max(0, last + 1 - (self.config.window_of(layer) or last + 1))
            for h, q_d in enumerate(q_Hd):
                keys, values = new[:, first : last + 1, h // share]
                scores = keys @ q_d * self.config.head_dim**-0.5
                if self.config.attention_cap:
                    scores = self.config.attention_cap * torch.tanh(scores / self.config.attention_cap)
                rows.append(scores.softmax(0) @ values)
        return torch.stack(rows).view_as(q_NHd)


def expected(decoder: Decoder, prompt: list[int], parts: Parts, num_tokens: int) -> list[int]:
    """A greedy answer whose tokens are computed one by one, each in the sub-network of its position."""
    kept, tokens, answer = Kept(decoder), list(prompt), list[int]()
    for position in range(len(prompt) + num_tokens - 1):
        spec = [spec for first, spec in parts if first <= position][-1]
        batch = Batch.ragged([torch.tensor(tokens[position : position + 1])], [spec], [position], [None], [None])
        with torch.inference_mode():
            hidden_ND = decoder(batch, kept)
        if position >= len(prompt) - 1:
            answer.append(int(decoder.logits(hidden_ND)[0].argmax()))
            tokens = prompt + answer
    return answer


def narrower(rng: random.Random, spec: SubnetSpec, config_specs: list[SubnetSpec]) -> SubnetSpec:
    return rng.choice(config_specs).with_groups_of(spec)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("num_pages", [60, 14])
def test_answers_are_those_of_kept_keys_and_values(name: str, num_pages: int, native: bool) -> None:
    decoder, rng = random_decoder(name), random.Random(7)
    specs = ragged_specs(decoder.config, 4)
    core = engine(decoder, num_pages=num_pages, native=native)
    made: dict[Request, Parts] = {}
    computed: dict[Request, int] = {}
    left = 14
    while left or core.has_unfinished:
        if left and rng.random() < 0.6:
            left -= 1
            prompt = [rng.randrange(decoder.config.vocab_size) for _ in range(rng.randint(1, 20))]
            network = core.network(rng.choice(specs))
            request = core.add(str(left), prompt, SamplingParams(max_tokens=rng.randint(1, 16)), network)
            made[request] = [(0, network.spec)]
        open_ = list(core.scheduler)
        if open_ and rng.random() < 0.4:
            request = rng.choice(open_)
            spec = narrower(rng, request.network.spec, specs)
            core.narrow(request, spec)
            made[request].append((request.num_computed_tokens, spec))
        core.step()
        core.pool.check_integrity([page for s in core.scheduler for page in s.pages])
        for request in core.scheduler:
            if request.num_computed_tokens < computed.get(request, 0):  # it has started over
                made[request] = [(0, made[request][-1][1])]
            computed[request] = request.num_computed_tokens
    assert (core.scheduler.num_preemptions > 0) == (num_pages < 20)
    assert sum(len(parts) > 1 for parts in made.values()) >= 4
    for request, parts in made.items():
        wanted = expected(decoder, request.tokens[: request.num_prompt], parts, request.params.max_tokens)
        assert request.answer == wanted
    assert core.pool.num_used == 0


def run(core: EngineCore) -> None:
    while core.has_unfinished:
        core.step()


@pytest.mark.parametrize("native", PATHS)
def test_pages_of_two_sub_networks_are_shared_with_nobody(native: bool) -> None:
    core = engine(DECODER, num_pages=60, native=native)
    wide, params = core.network(DECODER.widths), SamplingParams(max_tokens=12)
    request = core.add("0", PROMPT, params, wide)
    for _ in range(4):
        core.step()
    num_before = request.num_computed_tokens
    core.narrow(request, SPECS[0])
    run(core)
    again = core.add("1", request.tokens, params, wide)
    run(core)
    assert again.num_cached_tokens == num_before // 4 * 4  # what was computed before may be shared
    assert again.answer == generate(DECODER, [request.tokens], DECODER.widths, params)[0]


def test_speculation_goes_on_in_the_narrower_sub_network() -> None:
    wide, narrow = DECODER.widths, SPECS[0].with_groups_of(DECODER.widths)
    speculation = Speculation(drafts=(SPECS[1],), num_tokens=2)
    core = engine(DECODER, num_pages=60, native=PATHS[0], speculation=speculation)
    request = core.add("0", PROMPT, SamplingParams(max_tokens=24), core.network(wide))
    for _ in range(4):
        core.step()
    parts = [(0, wide), (request.num_computed_tokens, narrow)]
    core.narrow(request, narrow)
    run(core)
    assert request.answer == expected(DECODER, PROMPT, parts, 24)
    assert core.speculator is not None
    assert core.speculator.num_drafted > 0


def test_what_cannot_be_is_refused() -> None:
    core = engine(DECODER, num_pages=60, native=False)
    params = SamplingParams(max_tokens=3)
    request = core.add("0", PROMPT, params, core.network(SPECS[0]))
    core.step()
    with pytest.raises(FlextronError, match="more KV groups than it has had"):
        core.narrow(request, DECODER.widths)
    assert request.network is core.network(SPECS[0])
    run(core)
    core.narrow(request, DECODER.widths)  # it has ended: nothing happens
    assert request.finish_reason is FinishReason.LENGTH
    assert request.answer == generate(DECODER, [PROMPT], SPECS[0], params)[0]

"""Adapters in the engine against `peft` on stock `transformers` models, and against weights with them merged in."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from flextron.checkpoints.peft.reading import read_adapter
from flextron.checkpoints.peft.writing import write_adapter
from flextron.checkpoints.weights import write_checkpoint
from flextron.elastic.extract import extract
from flextron.engine import EngineCore, Network, Request, Speculation
from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams, generate
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import decoder_of, hf_config_of, hf_greedy, random_model, random_tokens, stock
from tests.engine.test_engine import DECODER, PATHS, SPECS, engine
from tests.model.adapter_cases import merged, random_ia3, random_lora
from tests.model.test_token_routing import BySign, spec_of
from tests.random_decoders import ragged_specs, random_decoder

# peft asks transformers under a name that the latter has retired
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = DECODER.config
FULL = CONFIG.full_spec
GREEDY = SamplingParams(max_tokens=7)
PROMPTS = [random_tokens(n, seed=n).tolist() for n in (9, 3, 14, 1, 6)]


def finish(core: EngineCore) -> None:
    """Run all requests to their ends; check the cache after every step."""
    while core.has_unfinished:
        core.step()
        core.pool.check_integrity([page for s in core.scheduler for page in s.pages])


def answers(core: EngineCore, prompts: Sequence[list[int]], networks: Sequence[Network]) -> list[list[int]]:
    """Greedy ones, all in shared batches."""
    asked = zip(prompts, networks, strict=True)
    requests = [core.add(str(i), prompt, GREEDY, network) for i, (prompt, network) in enumerate(asked)]
    finish(core)
    return [s.answer for s in requests]


def mixed_adapters(config: DecoderConfig) -> list[Adapter]:
    """Different ranks, linears and methods; the last one runs by operators only."""
    return [
        random_lora(config, rank=3),
        random_lora(config, rank=8, seed=1, targets=["q", "down"]),
        random_lora(config, rank=17, seed=2, targets=["k", "o", "up"]),
        random_ia3(config, input_targets=["down"]),
        random_ia3(config, seed=1, targets=["up"], input_targets=["up"]),
    ]


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox"])
def test_answers_are_those_of_peft(case: str, tmp_path: Path) -> None:
    """Five adapters in two sub-networks, and none, in one batch; compiled and by operators."""
    model = random_model(case)
    decoder = decoder_of(model)
    config = decoder.config
    # stock GPT-2 and NeoX have as many heads as fill the hidden size
    num_groups = 1 if case == "llama" else config.num_groups
    narrow = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=num_groups, skip=[1])
    (tmp_path / "narrow").mkdir()
    write_checkpoint(extract(decoder, narrow), tmp_path / "narrow", hf_config=hf_config_of(model), tokenizer=None)
    asked: list[tuple[SubnetSpec, Adapter | None]] = [(config.full_spec, None), (narrow, None)]
    wanted = [hf_greedy(m, PROMPTS[0], 7) for m in (model, stock(tmp_path / "narrow"))]
    for i, adapter in enumerate(mixed_adapters(config)):
        write_adapter(adapter, tmp_path / f"{i}")
        write_adapter(adapter.narrowed(narrow), tmp_path / f"{i}-narrow")
        read = read_adapter(tmp_path / f"{i}", decoder)
        theirs: Any = PeftModel.from_pretrained(random_model(case), tmp_path / f"{i}").eval()
        asked.append((config.full_spec, read))
        wanted.append(hf_greedy(theirs, PROMPTS[i], 7))
        theirs = PeftModel.from_pretrained(stock(tmp_path / "narrow"), tmp_path / f"{i}-narrow").eval()
        asked.append((narrow, read))
        wanted.append(hf_greedy(theirs, PROMPTS[i], 7))
    assert len({tuple(answer) for answer in wanted}) > len(wanted) / 2
    prompts = [PROMPTS[0], PROMPTS[0], *(p for p in PROMPTS for _ in range(2))]
    for native in PATHS:
        core = engine(decoder, num_pages=40, native=native)
        assert answers(core, prompts, [core.network(s, adapter=a) for s, a in asked]) == wanted


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("name", ["llama-mqa", "mistral", "gpt2", "neox"])
def test_any_sub_networks_answer_as_with_merged_weights(name: str, native: bool) -> None:
    """Requests come while others run, find no room, and begin alike."""
    decoder, rng = random_decoder(name), random.Random(1)
    specs = ragged_specs(decoder.config, 3)
    kinds: list[Adapter | None] = [None, *mixed_adapters(decoder.config)]
    decoders = [decoder if a is None else merged(decoder, a) for a in kinds]
    core = engine(decoder, num_pages=15, native=native)
    drawn = [(i % len(kinds), rng.choice(specs), rng.choice(PROMPTS[::2])) for i in range(9)]
    asked = [rng.choice(drawn) for _ in range(24)]
    requests: list[Request] = []
    for i, (kind, spec, prompt) in enumerate(asked):
        requests.append(core.add(str(i), prompt, GREEDY, core.network(spec, adapter=kinds[kind])))
        core.step()
    finish(core)
    assert core.scheduler.num_cached_tokens
    assert [s.answer for s in requests] == [
        generate(decoders[kind], [prompt], spec, GREEDY)[0] for kind, spec, prompt in asked
    ]
    assert core.pool.num_used == 0


@pytest.mark.parametrize("native", PATHS)
def test_logprobs_are_those_of_the_decoder_with_the_adapter(native: bool) -> None:
    core = engine(DECODER, num_pages=20, native=native)
    params = SamplingParams(max_tokens=3, logprobs=1)
    for adapter in mixed_adapters(CONFIG):
        request = core.add("a", [1, 2, 3], params, core.network(FULL, adapter=adapter))
        outputs = []
        while core.has_unfinished:
            outputs += core.step()
        batch = Batch.ragged([torch.tensor(request.tokens)], [FULL], adapters=[adapter])
        wanted = DECODER.logits(DECODER(batch)).log_softmax(-1)[2:]
        for output, row in zip(outputs, wanted, strict=False):
            assert output.logprobs is not None
            assert output.logprobs.chosen == pytest.approx(float(row.max().detach()), abs=1e-4)


def test_prefixes_are_shared_within_an_adapter_only() -> None:
    first, second = mixed_adapters(CONFIG)[:2]
    core = engine(DECODER, num_pages=40, native=False)
    prompt = PROMPTS[0]
    for i, (adapter, num_cached) in enumerate(
        [(None, 0), (first, 0), (second, 0), (first, 8), (None, 16), (second, 24)]
    ):
        core.add(str(i), prompt, GREEDY, core.network(FULL, adapter=adapter))
        finish(core)
        assert core.scheduler.num_cached_tokens == num_cached
    # nor with what a forgotten adapter left behind
    for i in range(3):
        core.forget(first)
        core.add(str(i), prompt, GREEDY, core.network(FULL, adapter=first))
        finish(core)
    assert core.scheduler.num_cached_tokens == 24


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("drafts", [False, True])
def test_a_forgotten_adapter_goes_with_its_last_request(native: bool, drafts: bool) -> None:
    adapter = random_lora(CONFIG)
    wanted = generate(merged(DECODER, adapter), [[1, 2]], FULL, GREEDY)[0]
    speculation = Speculation(drafts=(SPECS[0],), num_tokens=2) if drafts else None
    core = engine(DECODER, num_pages=20, native=native, speculation=speculation)
    plain = core.add("plain", [1, 2], SamplingParams(max_tokens=20), core.network(FULL))
    running = core.add("adapted", [1, 2], GREEDY, core.network(FULL, adapter=adapter))
    core.step()
    core.forget(adapter)
    held = weakref.ref(adapter)
    del adapter
    while running.finish_reason is None:
        assert held() is not None
        core.step()
    assert running.answer == wanted
    del running
    gc.collect()
    assert held() is None
    finish(core)
    assert plain.answer == generate(DECODER, [[1, 2]], FULL, SamplingParams(max_tokens=20))[0]
    other = random_lora(CONFIG)
    core.add("adapted", [1, 2], GREEDY, core.network(FULL, adapter=other))
    finish(core)
    held = weakref.ref(other)
    core.forget(other)
    del other
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("native", PATHS)
def test_drafts_change_no_answer_with_an_adapter(native: bool) -> None:
    lora, _, _, ia3, odd = mixed_adapters(CONFIG)
    for adapter in (lora, ia3, odd):
        core = engine(
            DECODER, num_pages=20, native=native, speculation=Speculation(drafts=(*SPECS, FULL), num_tokens=2)
        )
        network = core.network(FULL, adapter=adapter)
        for prompt in PROMPTS[:3]:
            assert answers(core, [prompt], [network]) == generate(merged(DECODER, adapter), [prompt], FULL, GREEDY)
        assert core.speculator is not None
        assert core.speculator.num_accepted > 0


def test_the_network_itself_drafts_with_its_adapter() -> None:
    core = engine(DECODER, num_pages=20, native=False, speculation=Speculation(drafts=(FULL,), num_tokens=3))
    answers(core, [[1, 2, 3]], [core.network(FULL, adapter=random_lora(CONFIG))])
    assert core.speculator is not None
    assert core.speculator.num_accepted == core.speculator.num_drafted > 0


@pytest.mark.parametrize("native", PATHS)
def test_adapters_run_beside_routed_tokens(native: bool) -> None:
    router, spec = BySign(), spec_of(DECODER)
    attention_only = random_lora(CONFIG, targets=["q", "v"])
    core = engine(DECODER, num_pages=40, native=native)
    asked: list[tuple[BySign | None, Adapter | None]] = [(router, None), (router, attention_only), (None, None)]
    asked += [(None, adapter) for adapter in mixed_adapters(CONFIG)]
    networks = [core.network(spec, r, adapter=a) for r, a in asked]
    decoders = [DECODER if a is None else merged(DECODER, a) for _, a in asked]
    wanted = [generate(d, [[1, 2, 3]], spec, GREEDY, r)[0] for d, (r, _) in zip(decoders, asked, strict=True)]
    assert answers(core, [[1, 2, 3]] * len(asked), networks) == wanted


def test_adapters_that_do_not_fit_are_refused() -> None:
    core = engine(DECODER, num_pages=10, native=False)
    narrow = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=1)
    adapter = random_lora(CONFIG, widths=narrow)
    with pytest.raises(FlextronError, match="narrower sub-network"):
        core.network(FULL, adapter=adapter)
    with pytest.raises(FlextronError, match="another model"):
        core.network(FULL, adapter=random_lora(random_decoder("qwen3").config))
    with pytest.raises(FlextronError, match="token router"):
        core.network(narrow, BySign(), adapter)
    assert core.network(narrow, adapter=adapter) is core.network(narrow, adapter=adapter)
    assert core.network(narrow, adapter=adapter) is not core.network(narrow)

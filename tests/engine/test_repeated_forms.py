"""The engine where iterations are repeated from memory that stays in place, as CUDA graphs are, in float64."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flextron.checkpoints.weights import write_checkpoint
from flextron.elastic.extract import extract
from flextron.engine import EngineCore, Speculation
from flextron.generation.generate import SamplingParams
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.paged import PagedStep
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import decoder_of, hf_config_of, hf_greedy, random_model, random_tokens, stock
from tests.engine.test_engine import PAGE, engine
from tests.model.adapter_cases import merged, random_lora
from tests.paged.sequences import Replays

NUM_TOKENS = 12


def repeating(decoder: Decoder, replays: Replays, **options: object) -> EngineCore:
    """An engine that repeats forms on the CPU."""
    core = engine(decoder, num_pages=40, native=False, **options)
    core.runner._paged = PagedStep(decoder, num_blocks=core.pool.num_blocks, page_size=PAGE, executor=replays)
    return core


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "gpt2", "neox"])
def test_answers_are_those_of_stock_transformers(case: str, drafts: bool, tmp_path: Path) -> None:
    """Two sub-networks and an adapter; requests come while others run, and begin alike."""
    model = random_model(case).double()
    decoder = decoder_of(model)
    config, rng = decoder.config, random.Random(case)
    # stock GPT-2 and NeoX have as many heads as fill the hidden size
    num_groups = config.num_groups if case in ("gpt2", "neox") else 1
    narrow = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=num_groups, skip=[1])
    adapter = random_lora(config, rank=3).double()
    cut, adapted = tmp_path / "narrow", tmp_path / "adapted"
    for path, source in ((cut, extract(decoder, narrow)), (adapted, merged(decoder, adapter))):
        path.mkdir()
        write_checkpoint(source, path, hf_config=hf_config_of(model), tokenizer=None)
    kinds: list[tuple[SubnetSpec, Adapter | None, torch.nn.Module]] = [
        (config.full_spec, None, model),
        (narrow, None, stock(cut).double()),
        (config.full_spec, adapter, stock(adapted).double()),
    ]
    shared = random_tokens(1, 9)[0].tolist()
    asked = [(rng.choice(kinds), shared[: rng.randint(5, 9)] + [i] * (i % 3)) for i in range(14)]
    replays, speculation = Replays(), Speculation(drafts=(narrow,), num_tokens=3, max_num_seqs=2)
    core = repeating(decoder, replays, speculation=speculation if drafts else None, max_num_seqs=2 if drafts else 5)
    requests = []
    for i, ((spec, beside, _), prompt) in enumerate(asked):
        network = core.network(spec, adapter=beside)
        requests.append(core.add(str(i), prompt, SamplingParams(max_tokens=NUM_TOKENS), network))
        core.step()
    while core.has_unfinished:
        core.step()
        core.pool.check_integrity([page for s in core.scheduler for page in s.pages])
    wanted = [hf_greedy(theirs, prompt, NUM_TOKENS) for (_, _, theirs), prompt in asked]
    assert [s.answer for s in requests] == wanted
    assert replays.num_replayed > 3
    assert core.scheduler.num_cached_tokens
    if drafts:
        assert core.speculator is not None
        assert core.speculator.num_drafted
    assert core.pool.num_used == 0

"""The engine on two processes against the engine on one, in float64; collectives are counted, not inferred.

The functions that take a device run on both ranks at once: the first has the engine, the other serves it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from flextron.engine import EngineCore, EngineSettings, Request, Speculation, follow
from flextron.errors import FlextronError
from flextron.generation.sampling import SamplingParams
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.model.outer import EmbeddingUpdate, Outer
from flextron.parallel.companions import LostRankError
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES, random_tokens
from tests.model.adapter_cases import random_ia3, random_lora
from tests.random_decoders import ragged_specs, random_decoder
from tests.ranks import Collectives, Ranks

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (9, 3, 14, 1, 6)]
PAGE = 4


def adapters_of(decoder: Decoder) -> list[Adapter | None]:
    """None, LoRA on all linears and on some, IA3 on both sides, and low rank beside the embedding."""
    config = decoder.config
    lora = random_lora(config, 2, 5)
    drawn = torch.Generator().manual_seed(6)
    update = EmbeddingUpdate(
        torch.randn(config.vocab_size, 2, generator=drawn), torch.randn(config.hidden_size, 2, generator=drawn), 0.5
    )
    outer = Outer(update=update, head_VD=torch.randn(config.vocab_size, config.hidden_size, generator=drawn))
    made = [
        random_lora(config, 3, 1),
        random_lora(config, 5, 2, targets=["k", "o", "up"]),
        random_ia3(config, 3),
        random_ia3(config, 4, targets=["q", "down"], input_targets=("q",)),
        Adapter(config, decoder.widths, lambda i, t, _: lora.at(i)[t], outer),
    ]
    return [None, *(adapter.double() for adapter in made)]


def engine(decoder: Decoder, num_ranks: int, num_pages: int = 40, **settings: Any) -> EngineCore:
    """So small that requests wait for pages."""
    block = 2 * PAGE * decoder.config.head_dim * decoder.dtype.itemsize
    blocks = num_pages * decoder.config.num_hidden_layers * decoder.config.num_key_value_heads // num_ranks
    sizes = {"kv_cache_gb": blocks * block / 1e9 + 1e-12, "page_size": PAGE, "max_num_seqs": 6}
    sizes |= {"max_num_batched_tokens": 16, "tensor_parallel": num_ranks}
    return EngineCore(decoder, EngineSettings(**{**sizes, **settings}))


def answered(
    core: EngineCore, specs: list[SubnetSpec], adapters: list[Adapter | None], params: SamplingParams
) -> list[Request]:
    """Requests of all kinds, which come while others run, some of them twice, and some of which become narrower."""
    rng = random.Random(0)
    requests = []
    for i in range(18):
        network = core.network(rng.choice(specs), adapter=rng.choice(adapters))
        requests.append(core.add(str(i), PROMPTS[i % len(PROMPTS)], params, network))
        core.step()
        if i % 4 == 3 and core.scheduler.running:
            request = core.scheduler.running[-1]
            core.narrow(request, specs[0].with_groups_of(request.network.spec))
        if i == 14:
            core.abort(requests[14])
    while core.has_unfinished:
        core.step()
        core.pool.check_integrity([page for s in core.scheduler for page in s.pages])
    return requests


def lead(run: Callable[[], Any]) -> Any:
    """What the first rank does while the other follows."""
    if dist.get_rank():
        follow()
        return None
    return run()


def compare(device: torch.device, case: str) -> None:
    decoder = random_decoder(case).double()
    specs, params = ragged_specs(decoder.config, 4), SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=1)

    def run() -> None:
        adapters = adapters_of(decoder)
        alone = answered(engine(decoder, 1, native=False), specs, adapters, params)
        core = engine(decoder.to("cpu"), 2)
        ours = answered(core, specs, adapters, params)
        assert [r.answer for r in ours] == [r.answer for r in alone]
        assert len({tuple(r.answer) for r in alone}) > 10
        assert core.pool.num_used == 0
        for mine, wanted in zip(ours, alone, strict=True):
            chosen = [x.chosen for x in wanted.prompt_logprobs]
            assert [x.chosen for x in mine.prompt_logprobs] == pytest.approx(chosen, abs=1e-9)
        for adapter in adapters[1:]:
            assert adapter is not None
            core.forget(adapter)
        again = core.add("again", PROMPTS[0], params, core.network(specs[-1], adapter=adapters[1]))
        while core.has_unfinished:
            core.step()
        core.close()
        core = engine(decoder, 1, native=False)
        whole = core.add("again", PROMPTS[0], params, core.network(specs[-1], adapter=adapters[1]))
        while core.has_unfinished:
            core.step()
        assert again.answer == whole.answer

    lead(run)


@pytest.mark.parametrize("case", ["llama-3", pytest.param("llama-mqa", marks=pytest.mark.slow), "gpt2"])
def test_answers_of_any_requests_are_those_of_one_rank(ranks: Ranks, case: str) -> None:
    ranks.run(compare, case)


def count(device: torch.device) -> dict[str, list[tuple[str, int]]]:
    """Collectives of an iteration that decodes and of one with prompts, with adapters and without."""
    decoder = random_decoder("llama-3").double()

    def run() -> dict[str, list[tuple[str, int]]]:
        core, found = engine(decoder.to("cpu"), 2), {}
        full, adapters = decoder.config.full_spec, [None, random_lora(decoder.config).double()]
        skipping = SubnetSpec.of([5, 0, 5], [1, 0, 0])
        for name, specs, beside in (
            ("plain", [full, full], [None, None]),
            ("adapted", [full, full], adapters),
            ("skipping", [skipping, skipping], adapters),
        ):
            for spec, adapter in zip(specs, beside, strict=True):
                core.add(name, PROMPTS[0], SamplingParams(max_tokens=4), core.network(spec, adapter=adapter))
            core.step()
            with Collectives() as decoding:
                core.step()
            found[name] = decoding.calls
            while core.has_unfinished:
                core.step()
        core.close()
        return found

    return lead(run)  # type: ignore[no-any-return]


def test_an_iteration_has_the_sums_of_the_layers_and_one_broadcast(ranks: Ranks) -> None:
    found, _ = ranks.run(count)
    size = CASES["llama-3"].hidden_size * 8
    for name, num_sums in (("plain", 6), ("adapted", 6), ("skipping", 3)):
        plan, *sums = found[name]
        assert plan[0] == "broadcast_"
        assert {kind for kind, _ in sums} == {"allreduce_"}
        # a prompt of nine and one that waits for room in the second iteration: as many tokens in each sum
        assert len(sums) == num_sums, name
        assert len({n for _, n in sums}) == 1
        assert sums[0][1] % size == 0


def draft(device: torch.device) -> None:
    """Speculation with narrow drafts changes nothing."""
    decoder = random_decoder("llama-3").double()
    narrow = SubnetSpec.of([9, 40, 5], [1, 2, 0])

    def run() -> None:
        params = SamplingParams(max_tokens=9)
        requests = []
        for num_ranks in (1, 2):
            drafts: dict[str, Any] = {"speculation": Speculation(drafts=(narrow,), num_tokens=2)}
            core = engine(decoder.to("cpu"), num_ranks, **(drafts if num_ranks == 2 else {"native": False}))
            for i in range(3):
                requests.append(core.add(str(i), PROMPTS[i], params, core.network(decoder.config.full_spec)))
                while core.has_unfinished:
                    core.step()
            if core.speculator is not None:
                assert core.speculator.num_drafted > 10
            core.close()
        assert [r.answer for r in requests[3:]] == [r.answer for r in requests[:3]]

    lead(run)


def test_drafts_run_on_all_ranks(ranks: Ranks) -> None:
    ranks.run(draft)


def refuse(device: torch.device) -> list[str]:
    decoder = random_decoder("llama-3")

    def run() -> list[str]:
        core, said = engine(decoder.to("cpu"), 2), []

        class _Router:
            def check(self, config: object, spec: object) -> None: ...

        router: Any = _Router()
        attempts: list[Callable[[], object]] = [
            lambda: core.network(decoder.config.full_spec, router),
            lambda: engine(decoder, 2),
            lambda: engine(decoder, 3),
        ]
        for attempt in attempts:
            with pytest.raises(FlextronError) as error:
                attempt()
            said.append(str(error.value))
        core.close()
        return said

    return lead(run)  # type: ignore[no-any-return]


def test_what_does_not_go_on_ranks_is_refused(ranks: Ranks) -> None:
    (router, second, third), _ = ranks.run(refuse)
    assert router.startswith("token routers do not run on several ranks")
    assert "close the other engine" in second
    assert third == "3 ranks cannot share the 2 attention groups of layer 0; use at most 2"
    for settings in ({"weights": "int8"}, {"native": True}):
        with pytest.raises(FlextronError, match="several ranks run PyTorch's operators on float32 weights"):
            EngineSettings(tensor_parallel=2, **settings)  # type: ignore[arg-type]


def keep_asking(core: EngineCore) -> None:
    while True:
        core.add("again", PROMPTS[0], SamplingParams(max_tokens=5), core.network(core.decoder.config.full_spec))
        core.step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are to share the processor")
def test_the_engine_starts_the_others_and_ends_with_one_sentence_when_one_is_lost() -> None:
    decoder = random_decoder("llama-3").double()
    core = engine(decoder, 2)
    heard: list[LostRankError] = []
    core.on_loss(heard.append)
    try:
        full, params = decoder.config.full_spec, SamplingParams(max_tokens=5)
        ours = core.add("ours", PROMPTS[0], params, core.network(full))
        alone = engine(decoder, 1, native=False)
        wanted = alone.add("wanted", PROMPTS[0], params, alone.network(full))
        for each in (core, alone):
            while each.has_unfinished:
                each.step()
        assert ours.answer == wanted.answer
        runner: Any = core.runner
        (process,) = runner.companions._processes.values()
        core.add("ours", PROMPTS[0], params, core.network(full))
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LostRankError, match=r"^rank 1 of 2 was ended by SIGKILL, .*; start again$"):
            keep_asking(core)
        assert time.monotonic() - began < 10
        assert len(heard) == 1
    finally:
        core.close()
    assert not dist.is_initialized()

"""The engine on a GPU: answers as on the CPU, from CUDA graphs, in mixed batches."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from flextron.engine import Speculation
from flextron.generation.decoding import Steps
from flextron.generation.generate import SamplingParams, generate
from flextron.paged import PagedStep
from tests.engine.test_engine import engine, random_requests, serve
from tests.model.adapter_cases import merged, random_lora
from tests.paged.sequences import NUM_BLOCKS, PAGE, Blocks, reference
from tests.random_decoders import ragged_specs, random_decoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "mistral", "gemma2", "gpt2", "neox"])
def test_answers_are_the_cpus(name: str, drafts: bool) -> None:
    decoder, rng = random_decoder(name).double(), random.Random(1)
    specs = ragged_specs(decoder.config, 3)
    asked = random_requests(rng, decoder.config.vocab_size, specs, 20)
    speculation = Speculation(drafts=(specs[0],), num_tokens=3) if drafts else None
    core = engine(copy.deepcopy(decoder).cuda(), num_pages=30, native=False, speculation=speculation)
    requests = serve(core, asked, rng)
    assert [s.answer for s in requests] == [generate(decoder, [r.prompt], r.spec, r.params)[0] for r in asked]
    assert any(kept.num_runs > 2 for kept in core.runner._paged._kept.values())


def test_adapters_share_a_batch_and_leave() -> None:
    decoder = random_decoder("llama").double()
    adapters = [
        None,
        random_lora(decoder.config, rank=3).double(),
        random_lora(decoder.config, rank=5, seed=1).double(),
    ]
    core = engine(copy.deepcopy(decoder).cuda(), num_pages=60, native=False)
    params, prompt = SamplingParams(max_tokens=9), [3, 1, 4, 1, 5]
    moved = [a and copy.deepcopy(a).cuda() for a in adapters]
    for _ in range(3):
        requests = [
            core.add(str(i), prompt, params, core.network(decoder.widths, adapter=a)) for i, a in enumerate(moved)
        ]
        while core.has_unfinished:
            core.step()
        for request, adapter in zip(requests, adapters, strict=True):
            own = decoder if adapter is None else merged(decoder, adapter)
            assert request.answer == generate(own, [prompt], decoder.widths, params)[0]
    for adapter in moved[1:]:
        core.forget(adapter)
    assert all(s.adapter is None for form in core.runner._paged._kept for s in form.segments)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_fewer_bits_give_nearly_the_same(dtype: torch.dtype, bar: float) -> None:
    """Pages of 16 tokens, as they are served, which PyTorch's fused kernels take."""
    exact = random_decoder("llama")
    step = PagedStep(copy.deepcopy(exact).to("cuda", dtype), num_blocks=NUM_BLOCKS, page_size=PAGE)
    sequence = Blocks(exact, random.Random(0)).sequence([7 * i % 60 for i in range(24)], exact.widths)
    for length in (9, 1, 1, 1, 5, 1):
        found = step.run([sequence.span(length)], range(length)).hidden_RD.float().cpu()
        wanted = reference(exact, sequence, length)
        assert float((found - wanted).norm() / wanted.norm()) < bar
        sequence.done += length


def test_what_is_timed_is_what_serves() -> None:
    decoder = random_decoder("llama").cuda()
    steps = Steps(decoder, decoder.widths, 2, 12)
    assert type(steps._steps).__name__ == "_PagedSteps"
    new = [torch.tensor([1, 2, 3], device="cuda"), torch.tensor([4, 5], device="cuda")]
    wanted = generate(random_decoder("llama"), [[1, 2, 3], [4, 5]], decoder.widths, SamplingParams(max_tokens=1))
    assert steps.run(new, [0, 0]).argmax(-1).tolist() == [answer[0] for answer in wanted]

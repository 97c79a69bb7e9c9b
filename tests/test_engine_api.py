"""The engine's text face against generation one by one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flextron import ElasticModel, Engine, FlextronError, SamplingParams, Target
from flextron.checkpoints.peft.writing import write_adapter
from flextron.generation.generate import generate
from flextron.kernels.decoder import Weights, why_not_native
from flextron.model.adapter import Adapter
from flextron.spec import SubnetSpec
from tests.model.adapter_cases import merged, random_lora, randomize
from tests.trained import trained_model

PROMPTS = ["The city was", "In 1998", "Once upon a time there", "a"]


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return trained_model()


@pytest.fixture(scope="module")
def engine(model: ElasticModel) -> Engine:
    return Engine(model, kv_cache_gb=0.01, max_num_seqs=3, max_num_batched_tokens=16)


def test_mixed_targets_in_one_batch(engine: Engine, model: ElasticModel) -> None:
    specs = [model.select(latency=0.8), model.space.full, model.select(latency=0.5), model.select(params=200_000)]
    targets: list[Target | SubnetSpec | None] = [Target(latency=0.8), None, specs[2], Target(params=200_000)]
    found = engine.generate(PROMPTS, SamplingParams(max_tokens=24), target=targets)
    for prompt, spec, completion in zip(PROMPTS, specs, found, strict=True):
        assert completion.text == model.generate(prompt, spec=spec, max_tokens=24)
        assert completion.spec == spec
        assert completion.finish_reason == "length"
        assert model.tokenizer is not None
        assert completion.num_prompt_tokens == len(model.tokenizer.encode(prompt))
        assert len(completion.token_ids) == 24
        assert completion.logprobs is None


def test_routed_tokens(engine: Engine, model: ElasticModel) -> None:
    assert model.token_router is not None
    target = next(iter(model.token_router.specs))
    asked = Target(latency=target)
    found = engine.generate(PROMPTS, SamplingParams(max_tokens=8), target=asked, router="token")
    wanted = [model.generate(p, latency=target, router="token", max_tokens=8) for p in PROMPTS]
    assert [c.text for c in found] == wanted
    with pytest.raises(FlextronError, match="needs a target by latency"):
        engine.generate("a", router="token")


def test_one_text_or_token_ids(engine: Engine, model: ElasticModel) -> None:
    assert model.tokenizer is not None
    (one,) = engine.generate("The city was", SamplingParams(max_tokens=6, logprobs=2))
    (same,) = engine.generate([model.tokenizer.encode("The city was")], [SamplingParams(max_tokens=6)])
    assert one.text == same.text
    assert one.logprobs is not None
    assert [p.top[0][0] for p in one.logprobs] == list(one.token_ids)
    assert [len(p.top) for p in one.logprobs] == [2] * 6


def test_stop_strings(engine: Engine) -> None:
    (free,) = engine.generate("The city was", SamplingParams(max_tokens=40))
    word = free.text.split()[4]
    (stopped,) = engine.generate("The city was", SamplingParams(max_tokens=40), stop=word)
    assert stopped.text == free.text[: free.text.index(word)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": ["a", "b"], "params": [SamplingParams()]}, "1 entries of params for 2 prompts"),
        ({"prompts": ["a"], "target": [None, None]}, "2 entries of target for 1 prompts"),
        ({"prompts": [1, 2]}, "put a single list of ids into a list"),
        ({"prompts": ["a", ""]}, "prompt is empty"),
        ({"prompts": [[1], [-1]]}, "outside the model's vocabulary"),
        ({"prompts": [[10**30]]}, "outside the model's vocabulary"),
        ({"prompts": ["a"], "target": Target(latency=0.01)}, "spans 0.5 to 1"),
        ({"prompts": ["a"], "params": SamplingParams(max_tokens=1000)}, "128 positions"),
        ({"prompts": ["a"], "stop": ["", "b"]}, "stop string is empty"),
        ({"prompts": ["a"], "adapter": [None, None]}, "2 entries of adapter for 1 prompts"),
        ({"prompts": ["a"], "adapter": "nowhere"}, "does not exist"),
    ],
)
def test_bad_requests_leave_nothing_behind(engine: Engine, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(FlextronError, match=said):
        engine.generate(**arguments)  # type: ignore[arg-type]
    assert engine.generate("a", SamplingParams(max_tokens=1))[0].num_prompt_tokens == 1


def test_settings_and_models_are_checked(model: ElasticModel) -> None:
    with pytest.raises(FlextronError, match="no setting 'speed'"):
        Engine(model, speed=2)
    with pytest.raises(FlextronError, match="not a directory"):
        Engine("nowhere")


def test_adapters_and_targets_in_one_batch(engine: Engine, model: ElasticModel, tmp_path: Path) -> None:
    config, params = model.decoder.config, SamplingParams(max_tokens=12)
    first, second = random_lora(config, rank=4), random_lora(config, rank=2, seed=1, targets=["q", "down"])
    write_adapter(first, tmp_path / "first")
    adapters: list[Adapter | str | Path | None] = [tmp_path / "first", None, second, str(tmp_path / "first")]
    specs: list[Target | SubnetSpec | None] = [None, None, model.select(latency=0.5), model.select(latency=0.8)]
    found = engine.generate(PROMPTS, params, target=specs, adapter=adapters)
    # it was read once for all
    shutil.rmtree(tmp_path / "first")
    for prompt, spec, adapter, completion in zip(PROMPTS, specs, (first, None, second, first), found, strict=True):
        assert model.tokenizer is not None
        assert isinstance(spec, SubnetSpec | None)
        decoder = model.decoder if adapter is None else merged(model.decoder, adapter)
        stop = replace(params, stop_token_ids=model.generation_defaults.ends)
        (wanted,) = generate(decoder, [model.tokenizer.encode(prompt)], spec or model.space.full, stop)
        assert list(completion.token_ids) == wanted
    everywhere = engine.generate(PROMPTS, params, adapter=first)
    assert everywhere[0].token_ids == found[0].token_ids
    assert everywhere[1].token_ids != found[1].token_ids
    # an adapter that has changed between two calls is not mistaken for what it was
    randomize(first, seed=3)
    text = "The city was in the north of the country"
    (changed,) = engine.generate(text, params, adapter=first)
    assert model.tokenizer is not None
    decoder, stop = merged(model.decoder, first), replace(params, stop_token_ids=model.generation_defaults.ends)
    assert [list(changed.token_ids)] == generate(decoder, [model.tokenizer.encode(text)], model.space.full, stop)
    assert (changed.token_ids,) != tuple(c.token_ids for c in engine.generate(text, params, adapter=adapters[0]))


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_drafts_change_no_answer(engine: Engine, model: ElasticModel, weights: Weights) -> None:
    if weights != "float32" and why_not_native(model.decoder) is not None:
        pytest.skip("needs the compiled iteration")
    drafting = Engine(model, speculate=weights, kv_cache_gb=0.01, max_num_seqs=3)
    params = SamplingParams(max_tokens=40)
    for stop in ([], ["e"]):
        for prompt in PROMPTS:
            wanted = engine.generate(prompt, params, stop=stop)
            assert [c.text for c in drafting.generate(prompt, params, stop=stop)] == [c.text for c in wanted]
    speculator = drafting.core.speculator
    assert speculator is not None
    assert speculator.num_accepted > 0

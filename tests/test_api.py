"""The Python face from one end to the other on a tiny checkpoint, and what it says when something is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flextron
from flextron import ElasticModel, FlextronError, SearchSettings, TrainRecipe
from flextron.model.batch import Batch
from flextron.model.cost import num_parameters
from flextron.routing import latency as latency_module
from flextron.server.startup import missing_measurements
from tests.tiny import make_tiny_llama
from tests.toy import prose, same_weights, synthetic_latencies, weights_of

TEXTS = [prose(3000, seed=s) for s in range(8)]
RATIOS = (0.25, 0.5, 1.0)
RECIPE = TrainRecipe(tokens=4 * 2 * 32, context=32, batch_size=2, micro_batch_size=2, lr=1e-4)
SEARCH = SearchSettings(targets=(0.9, 0.8), rounds=1, refinements=1, num_uniform=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "tiny"
    make_tiny_llama(path)
    return path


def converted(source: Path, **options: object) -> ElasticModel:
    """A small conversion of the tiny checkpoint."""
    values = {"calibration": TEXTS, "ratios": RATIOS, "num_calibration_tokens": 512, "context": 64} | options
    return flextron.convert(source, **values)  # type: ignore[arg-type]


def profile(model: ElasticModel) -> None:
    model.profile(TEXTS, settings=SEARCH, num_tokens=256, context=32, decode_context=16)


@pytest.fixture(scope="module")
def profiled(checkpoint: Path) -> ElasticModel:
    model = converted(checkpoint)
    profile(model)
    return model


def test_from_a_checkpoint_to_a_stock_sub_network(checkpoint: Path, tmp_path: Path) -> None:
    model = converted(checkpoint)
    assert model.space.full == model.decoder.widths
    model.save(tmp_path / "elastic")
    model = flextron.load(tmp_path / "elastic")
    untrained = weights_of(model.decoder)
    steps: list[tuple[int, int]] = []
    result = model.train(TEXTS, RECIPE, on_step=lambda done, total, losses: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.num_tokens == RECIPE.tokens
    assert not same_weights(weights_of(model.decoder), untrained)
    profile(model)
    model.save(tmp_path / "elastic", overwrite=True)
    model = flextron.load(tmp_path / "elastic")
    assert model.info.recipe["train"] == RECIPE.model_dump(mode="json")
    assert model.frontier is not None

    smallest = min(p.params for p in model.frontier.points if p.spec.is_uniform)
    spec = model.select(params=smallest, uniform=True)
    assert model.num_parameters(spec) == smallest < model.num_parameters()
    text = model.generate("Once upon", spec=spec, max_tokens=5)
    assert text == model.generate("Once upon", params=smallest, max_tokens=5)
    dense = model.extract(spec)
    assert dense.generate("Once upon", max_tokens=5) == text
    dense.save_pretrained(tmp_path / "dense")

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert sum(p.numel() for p in stock.parameters()) == smallest
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    tokens = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = model.decoder.logits(model.decoder(Batch.padded(tokens, spec)))
        torch.testing.assert_close(stock(tokens).logits[0], ours, rtol=1e-4, atol=1e-4)
    # the elastic directory is a stock checkpoint of the full model, too
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic").eval()(tokens).logits[0]
        torch.testing.assert_close(full, model.decoder.logits(model.decoder(Batch.padded(tokens, model.space.full))))


def test_conversion_keeps_the_full_model(checkpoint: Path) -> None:
    model = converted(checkpoint)
    tokens = torch.arange(40).view(2, 20)
    original = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        ours = model.decoder.logits(model.decoder(Batch.padded(tokens, model.space.full)))
        torch.testing.assert_close(original(tokens).logits.flatten(0, 1), ours, rtol=1e-4, atol=1e-4)
    assert model.space.intermediate_sizes == (64, 128, 256)
    assert model.space.num_groups == (1, 2)
    assert 0 not in model.space.skippable_layers
    assert 3 not in model.space.skippable_layers


def test_everything_is_read_back_as_it_was_saved(profiled: ElasticModel, tmp_path: Path) -> None:
    profiled.save(tmp_path / "elastic")
    back = flextron.load(tmp_path / "elastic")
    assert back.info == profiled.info
    assert back.tables == profiled.tables
    assert back.frontier == profiled.frontier
    assert same_weights(weights_of(back.decoder), weights_of(profiled.decoder))


def test_a_frontier_of_another_device_gets_the_latencies_of_this_one(profiled: ElasticModel) -> None:
    frontier = profiled.frontier
    assert frontier is not None
    model = replace(profiled, frontier=replace(frontier, device="elsewhere"), tables={})
    assert len(missing_measurements(model)) == 1
    with pytest.raises(FlextronError, match="not on this device"):
        model.select(latency=0.9)
    searched: list[int] = []
    model.profile_here(on_search=lambda done, _: searched.append(done))
    assert missing_measurements(model) == []
    assert model.frontier is not None
    assert {(p.spec, p.loss) for p in model.frontier.points} == {(p.spec, p.loss) for p in frontier.points}
    (table,) = model.tables.values()
    assert all(p.latency_ms == table.predict_ms(p.spec) for p in model.frontier.points)
    assert not searched
    priced = model.frontier
    model.profile_here()
    assert model.frontier is priced  # nothing is missing any more


def test_a_profile_can_be_saved_alone(profiled: ElasticModel, checkpoint: Path, tmp_path: Path) -> None:
    converted(checkpoint).save(tmp_path / "elastic")
    profiled.save_profile(tmp_path / "elastic")
    back = flextron.load(tmp_path / "elastic")
    assert (back.tables, back.frontier) == (profiled.tables, profiled.frontier)


def test_targets_select_what_was_measured(profiled: ElasticModel) -> None:
    assert profiled.frontier is not None
    fastest = min(profiled.frontier.points, key=lambda p: p.latency_ms)
    assert profiled.select(latency_ms=fastest.latency_ms) == fastest.spec
    within = [p for p in profiled.frontier.points if p.latency <= 1]
    best = min(within, key=lambda p: p.loss)
    assert profiled.frontier_point(1.0).loss == best.loss
    assert profiled.select(max_loss_increase=100.0) == fastest.spec


def test_evaluation_is_the_loss_that_the_search_would_measure(profiled: ElasticModel) -> None:
    specs = {"full": profiled.space.full, "small": profiled.space.smallest}
    results = profiled.evaluate(specs, TEXTS, num_tokens=512, context=64)
    assert results.keys() == specs.keys()
    tokenizer = profiled.tokenizer
    assert tokenizer is not None
    ids = tokenizer(TEXTS[0])["input_ids"][:512]
    tokens = torch.tensor(ids).view(8, 64)
    for name, spec in specs.items():
        with torch.no_grad():
            logits = profiled.decoder.logits(profiled.decoder(Batch.padded(tokens, spec))).unflatten(0, (8, 64))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert results[name].loss == pytest.approx(float(loss), rel=1e-5)
        assert results[name].perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
        assert results[name].num_tokens == 8 * 63


def test_training_drops_the_frontier_and_keeps_the_latencies(checkpoint: Path) -> None:
    model = converted(checkpoint)
    profile(model)
    tables = dict(model.tables)
    assert tables
    model.train(TEXTS, RECIPE)
    assert model.frontier is None
    # latencies depend on widths alone: the next profile takes them as they are
    assert model.tables == tables
    with pytest.raises(FlextronError, match="profile"):
        model.select(latency=1.0)


def test_a_teacher_may_be_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    taught, alone = converted(checkpoint), converted(checkpoint)
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "teacher")
    losses = [
        m.train(TEXTS, RECIPE, teacher=t).history[-1]["loss"]
        for m, t in ((taught, tmp_path / "teacher"), (alone, None))
    ]
    assert losses[0] > 2 * losses[1]


def test_a_teacher_of_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    other.resize_token_embeddings(320, mean_resizing=False)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(FlextronError, match="vocabulary"):
        converted(checkpoint).train(TEXTS, RECIPE, teacher=tmp_path / "teacher")


def test_without_a_profile_no_target_is_known(checkpoint: Path) -> None:
    model = converted(checkpoint)
    for ask in (model.select, lambda **t: model.generate("Once", **t)):
        with pytest.raises(FlextronError, match=r"profile\(\)"):
            ask(latency=0.5)


def test_latencies_of_another_device_are_refused_but_sizes_hold(profiled: ElasticModel) -> None:
    assert profiled.frontier is not None
    elsewhere = replace(profiled, frontier=replace(profiled.frontier, device="abacus-2-threads-float32"))
    targets: tuple[dict[str, Any], ...] = ({"latency": 1.0}, {"latency_ms": 1e6})
    for target in targets:
        with pytest.raises(FlextronError, match="abacus-2-threads-float32"):
            elsewhere.select(**target)
    assert elsewhere.select(params=profiled.num_parameters()) == profiled.select(params=profiled.num_parameters())


def without_tokenizer(checkpoint: Path, path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(path)
    return path


def test_a_checkpoint_without_a_tokenizer_is_refused_where_text_comes_in(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match=r"tokenizer\.json"):
        converted(without_tokenizer(checkpoint, tmp_path / "bare"))
    model = converted(checkpoint)
    model.tokenizer = None
    for use in (lambda: model.generate("Once"), lambda: model.train(TEXTS, RECIPE), lambda: profile(model)):
        with pytest.raises(FlextronError, match=r"tokenizer\.json"):
            use()


def test_an_existing_directory_is_kept(profiled: ElasticModel, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("keep")
    dense = profiled.extract(profiled.space.full)
    for write in (profiled.save, dense.save_pretrained):
        with pytest.raises(FlextronError, match="exists already"):
            write(tmp_path / "there")
    assert [f.name for f in (tmp_path / "there").iterdir()] == ["mine.txt"]
    assert [f.name for f in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": ["too short"]}, "less than one context"),
        ({"multiple_of": 48}, "256 is not a multiple of 48"),
        ({"ratios": (0.5, 1.5)}, "ratios"),
        ({"max_skipped_layers": -1}, "max_skipped_layers"),
        ({"num_calibration_tokens": 10}, "one sequence"),
    ],
)
def test_choices_that_do_not_fit_are_refused(checkpoint: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(FlextronError, match=message):
        converted(checkpoint, **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.train(["too short"], RECIPE),
        lambda m: m.profile(["too short"], settings=SEARCH),
        lambda m: m.evaluate({"full": m.space.full}, ["too short"]),
    ],
)
def test_text_shorter_than_one_context_is_refused(
    profiled: ElasticModel, use: Callable[[ElasticModel], object]
) -> None:
    with pytest.raises(FlextronError, match="less than one context"):
        use(profiled)
    assert profiled.frontier is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "a" * 400}, "positions"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "latency": 1.5}, "latency"),
        ({"prompt": "a", "latency": 0.5, "params": 10}, "exactly one"),
        ({"prompt": "a", "params": 10}, "no sub-network reaches"),
    ],
)
def test_generation_refuses_what_it_cannot_do(profiled: ElasticModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(FlextronError, match=message):
        profiled.generate(**options)  # type: ignore[arg-type]


def test_directories_that_are_no_elastic_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    for path, remedy in ((tmp_path / "nowhere", "not a directory"), (checkpoint, "convert")):
        with pytest.raises(FlextronError, match=remedy):
            flextron.load(path)
    converted(checkpoint).save(tmp_path / "elastic")
    info = tmp_path / "elastic" / "elastic.json"
    data = json.loads(info.read_text())
    info.write_text(json.dumps(data | {"format_version": 99}))
    with pytest.raises(FlextronError, match="newer format"):
        flextron.load(tmp_path / "elastic")
    info.write_text(json.dumps({k: v for k, v in data.items() if k != "search_space"}))
    with pytest.raises(FlextronError, match="search_space"):
        flextron.load(tmp_path / "elastic")


def test_parameters_are_counted_from_shapes(profiled: ElasticModel) -> None:
    assert profiled.num_parameters() == sum(p.numel() for p in profiled.decoder.parameters())
    assert profiled.num_parameters(profiled.space.smallest) == num_parameters(
        profiled.decoder.config, profiled.space.smallest
    )


@pytest.mark.parametrize(
    ("text", "context"),
    [
        (TEXTS, 16),
        (["other words altogether " * 400], 32),
    ],
)
def test_another_text_or_context_is_not_trained_on_what_an_earlier_run_packed(
    text: list[str], context: int, checkpoint: Path, tmp_path: Path
) -> None:
    """A first run that ended before its first saved state leaves nothing that a second may mistake for its own."""

    class Interrupted(BaseException):
        pass

    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        converted(checkpoint).train(TEXTS, RECIPE, run_directory=tmp_path, on_step=stop)
    recipe = RECIPE.model_copy(update={"context": context})
    reference, model = converted(checkpoint), converted(checkpoint)
    expected = reference.train(text, recipe)
    try:
        result = model.train(text, recipe, run_directory=tmp_path)
    except FlextronError:
        return  # as good as starting anew
    assert result.num_steps == expected.num_steps
    assert result.history[0] == pytest.approx(expected.history[0], rel=1e-4)


def test_a_run_does_not_go_on_with_another_teacher(checkpoint: Path, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 2:
            raise Interrupted

    recipe = RECIPE.model_copy(update={"checkpoint_minutes": 1e-9})
    with pytest.raises(Interrupted):
        converted(checkpoint).train(TEXTS, recipe, run_directory=tmp_path, on_step=stop)
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(FlextronError, match="teacher"):
        converted(checkpoint).train(TEXTS, recipe, run_directory=tmp_path, teacher=tmp_path / "teacher")


def test_a_route_answers_targets_is_saved_and_trains_along(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
    model = converted(checkpoint)
    with pytest.raises(FlextronError, match=r"no router yet; run model\.route\(\)"):
        model.train(TEXTS, RECIPE, with_router=True)
    recipe = flextron.RouterRecipe(num_measured=16, warm_steps=20, router_steps=4)
    result = model.route(TEXTS, recipe, num_tokens=128, context=32)
    assert result.num_measured > 0
    assert model.frontier is not None
    assert {p.kind for p in model.frontier.points} == {"router", "uniform", "mix'n'match", "random"}
    (table,) = model.tables.values()
    for target in (0.7, 0.8, 0.9, 0.97):
        assert table.predict(model.select(latency=target)) <= target
    model.save(tmp_path / "routed")
    again = flextron.load(tmp_path / "routed")
    assert again.router is not None
    assert model.router is not None
    assert again.router.spec(0.95, table) == model.router.spec(0.95, table)
    before = {name: tensor.clone() for name, tensor in again.router.state_dict().items()}
    again.train(TEXTS, RECIPE, with_router=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in again.router.state_dict().items())


def test_memory_counts_weights_and_the_cache_of_the_context(profiled: ElasticModel) -> None:
    assert profiled.frontier is not None
    config = profiled.decoder.config
    for point in profiled.frontier.points:
        kv = sum(2 * config.kv_rows(layer.num_groups) * 4 for layer in point.spec.layers)
        limit = (4 * point.params + 100 * kv) / 1e9
        chosen = profiled.select(memory_gb=limit, context=100)
        room = 4 * num_parameters(config, chosen) + 100 * sum(
            2 * config.kv_rows(x.num_groups) * 4 for x in chosen.layers
        )
        assert room <= limit * 1e9 * (1 + 1e-9)
    with pytest.raises(FlextronError, match=r"no sub-network reaches memory_gb=1e-09; this model spans"):
        profiled.select(memory_gb=1e-9)


def test_a_router_of_another_space_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = converted(checkpoint)
    model.route(TEXTS, flextron.RouterRecipe(num_measured=8, warm_steps=2), num_tokens=64, context=32)
    model.save(tmp_path / "routed")
    other = converted(checkpoint, ratios=(0.5, 1.0))
    other.save(tmp_path / "other")
    (tmp_path / "other" / "routers.safetensors").write_bytes((tmp_path / "routed" / "routers.safetensors").read_bytes())
    with pytest.raises(FlextronError, match="router is of another model or search space; train it again with route"):
        flextron.load(tmp_path / "other")
    (tmp_path / "routed" / "routers.safetensors").write_bytes(b"cut short")
    with pytest.raises(FlextronError, match=r"routers\.safetensors is corrupt or truncated"):
        flextron.load(tmp_path / "routed")


def test_a_token_router_generates_within_its_targets_and_is_saved(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
    model = converted(checkpoint)
    with pytest.raises(FlextronError, match="no token router yet"):
        model.generate("Once", latency=0.8, router="token")
    profile(model)
    recipe = flextron.TokenRouterRecipe(
        warm_tokens=512, warm_epochs=1, num_draws=1, joint_steps=2, batch_size=4, heldout_blocks=4
    )
    result = model.route_tokens(TEXTS, recipe, targets=(0.9, 0.8), context=32)
    assert set(result.routed_kl) == {0.9, 0.8}
    assert all(ratio == pytest.approx(1, abs=0.05) for ratio in result.cost_ratio.values())
    written = model.generate("Once upon", latency=0.8, router="token", max_tokens=8)
    with pytest.raises(FlextronError, match=r"calibrated for the targets 0\.8, 0\.9, not 0\.7"):
        model.generate("Once", latency=0.7, router="token")
    with pytest.raises(FlextronError, match="latency targets only"):
        model.generate("Once", params=10**9, router="token")
    model.save(tmp_path / "routed")
    again = flextron.load(tmp_path / "routed")
    assert again.generate("Once upon", latency=0.8, router="token", max_tokens=8) == written
    (tmp_path / "routed" / "token_router.json").unlink()
    with pytest.raises(FlextronError, match=r"token_router\.json"):
        flextron.load(tmp_path / "routed")

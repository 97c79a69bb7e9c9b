"""Training on several processes against the same call on one: losses, gradients, states, what each rank holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flextron.elastic.adapter import ElasticAdapter
from flextron.routing.routers import StaticRouter
from flextron.spec import SubnetSpec
from flextron.training.router_joint import JointRouting
from flextron.training.router_recipe import RouterRecipe
from tests.random_decoders import random_decoder
from tests.ranks import Ranks
from tests.toy import SPACE, TABLE, toy_blocks, toy_recipe
from tests.training.rank_work import Case, bytes_held, first_steps, next_steps, outcome, prepared, refusal, routed

SKIPPING = (SubnetSpec.of([8, 0, 24], [1, 0, 2]), SPACE.full)
"""The first skips a layer."""
BOTH = [pytest.param({}, marks=pytest.mark.slow), {"lora_rank": 3}]
"""All weights, and low rank, which shards all that the other does."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    workers = Ranks("gloo", 2, tmp_path_factory.mktemp("pair"))
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    workers = Ranks("gloo", 4, tmp_path_factory.mktemp("four"))
    yield workers
    workers.close()


@torch.no_grad()
def case_of(name: str = "llama", *, specs: tuple[SubnetSpec, ...] = (), routed: bool = False, **changes: Any) -> Case:
    """A student that differs from its teacher, or one beside which an adapter trains."""
    recipe, teacher = toy_recipe(**changes), random_decoder(name)
    student = copy.deepcopy(teacher)
    lora = None
    if recipe.lora_rank is not None:
        lora = ElasticAdapter.fresh(teacher, recipe.lora_rank, recipe.lora_rank).lora
    for p in [*student.parameters(), *(() if lora is None else lora.parameters())]:
        p.add_(0.05 * torch.randn_like(p))
    router = JointRouting(router=StaticRouter(SPACE), table=TABLE, recipe=RouterRecipe()) if routed else None
    return Case(
        decoder=student,
        teacher=teacher,
        space=SPACE,
        blocks=toy_blocks(),
        recipe=recipe,
        adapter=lora,
        routing=router,
        specs=specs,
    )


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Sum of absolute differences; AdamW makes steps of rounding where a gradient is 0, so no single one tells."""
    assert a.keys() == b.keys()
    return sum(float((a[name] - b[name]).abs().sum()) for name in a)


def assert_as_alone(ranks: Ranks, case: Case) -> None:
    """Several processes train as one does, and all have all weights in the end."""
    expected, weights = outcome(None, case)
    moved = distance(weights, case.weights())
    assert moved > 0
    for history, own in ranks.run(outcome, case):
        for ours, theirs in zip(history, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert distance(own, weights) <= 0.01 * moved


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 3}, {"routed": True, "micro_batch_size": 4}], ids=str)
def test_losses_and_weights_are_those_of_one_process(pair: Ranks, changes: dict[str, Any]) -> None:
    assert_as_alone(pair, case_of(steps=5, batch_size=8, **changes))


HARD = {
    "tied head, its embeddings train": ("llama-3", {"train_embeddings": True, "lm_weight": 0.5}),
    "learned positions, biases": ("gpt2-rescaled", {"lr": 5e-4}),
    "side by side, one micro batch for two": ("neox", {"micro_batch_size": 8, "subnets_per_batch": 3}),
    "norms of heads": ("gemma3", {"lora_rank": 3}),
    "layers computed again": ("llama", {"gradient_checkpointing": True}),
    "many micro batches": ("llama", {"micro_batch_size": 1, "subnets_per_batch": 2, "kl_fraction": 0.1}),
    "sandwich": ("llama", {"sandwich": True, "micro_batch_size": 2, "lm_weight": 0.5}),
    "low rank, many micro batches": ("llama", {"lora_rank": 2, "micro_batch_size": 2, "train_embeddings": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", HARD)
@pytest.mark.parametrize("number", ["pair", "four"])
def test_whatever_the_model_and_the_cut(number: str, which: str, request: pytest.FixtureRequest) -> None:
    name, changes = HARD[which]
    case = case_of(name, **{"steps": 4, "batch_size": 8, "sampling": "random"} | changes)
    assert_as_alone(request.getfixturevalue(number), case)


@pytest.mark.parametrize("changes", BOTH, ids=str)
def test_layers_that_one_process_skips_and_the_other_does_not(pair: Ranks, changes: dict[str, Any]) -> None:
    # two sequences, each in a sub-network of its own
    assert_as_alone(pair, case_of(steps=4, batch_size=2, specs=SKIPPING, weight_decay=0.5, **changes))


def test_a_layer_that_all_skip_gets_no_step(pair: Ranks) -> None:
    # not even one of weight decay, as with one process
    case = case_of(steps=2, batch_size=2, specs=SKIPPING[:1], weight_decay=0.5)
    before = case.weights()
    for _, weights in pair.run(outcome, case):
        assert torch.equal(weights["decoder.layers.1.mlp.up.weight"], before["decoder.layers.1.mlp.up.weight"])
        assert not torch.equal(weights["decoder.layers.0.mlp.up.weight"], before["decoder.layers.0.mlp.up.weight"])


@pytest.mark.slow
def test_bf16_stays_near_that_of_one_process(pair: Ranks) -> None:
    case = case_of(steps=4, batch_size=8, precision="bf16")
    expected, _ = outcome(None, case)
    for history, _ in pair.run(outcome, case):
        for ours, theirs in zip(history, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


@pytest.mark.parametrize("changes", BOTH, ids=str)
def test_a_state_goes_on_with_any_number_of_processes(pair: Ranks, changes: dict[str, Any], tmp_path: Path) -> None:
    case = case_of(steps=8, batch_size=8, specs=(*SKIPPING, SPACE.smallest), **changes)
    alone = first_steps(None, case, tmp_path / "alone", 3)
    together = pair.run(first_steps, case, tmp_path / "pair", 3)[0]
    assert [h["loss"] for h in together] == pytest.approx([h["loss"] for h in alone], abs=1e-5)
    files = {p.suffix for p in (tmp_path / "pair").rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json"}
    expected = [h["loss"] for h in next_steps(None, case, tmp_path / "alone", 2)]
    one_of_two = [h["loss"] for h in next_steps(None, case, tmp_path / "pair", 2)]
    assert one_of_two == pytest.approx(expected, abs=1e-5)
    for of in ("alone", "pair"):
        for history in pair.run(next_steps, case, tmp_path / of, 2):
            assert [h["loss"] for h in history] == pytest.approx(one_of_two if of == "pair" else expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 3}], ids=str)
def test_four_save_and_two_or_one_go_on(pair: Ranks, four: Ranks, changes: dict[str, Any], tmp_path: Path) -> None:
    case = case_of("llama-3", steps=12, batch_size=8, **changes)
    four.run(first_steps, case, tmp_path, 6)
    expected = [h["loss"] for h in four.run(next_steps, case, tmp_path, 3)[0]]
    for history in [*pair.run(next_steps, case, tmp_path, 3), next_steps(None, case, tmp_path, 3)]:
        assert [h["loss"] for h in history] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_an_older_state_of_one_process_goes_on(pair: Ranks, tmp_path: Path) -> None:
    # two files of whole tensors, as they were written before states were made of shards
    case = case_of(steps=8, batch_size=8)
    run, kept = prepared(case, tmp_path / "new")
    assert kept is not None
    history = [run.step(step) for step in range(3)]
    kept.save(3, run.trained, run.optimizer, history)
    state = tmp_path / "old" / "state"
    state.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in run.trained.items()}, state / "model.safetensors")
    moments = {
        f"{name}:{key}": run.optimizer.state[p][key]
        for name, p in run.trained.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, state / "optimizer.safetensors")
    (state / "run.json").write_text(json.dumps({"step": 3, "identity": {"a": 1}, "history": history}))
    expected = [run.step(step)["loss"] for step in (3, 4)]
    for found in [next_steps(None, case, tmp_path / "old", 2), *pair.run(next_steps, case, tmp_path / "old", 2)]:
        assert [h["loss"] for h in found] == pytest.approx(expected, abs=1e-5)


def test_a_state_that_lacks_a_shard_is_refused_by_all(pair: Ranks, tmp_path: Path) -> None:
    case = case_of(steps=8, batch_size=8)
    pair.run(first_steps, case, tmp_path, 1)
    files = sorted((tmp_path / "state").glob("*.safetensors"))
    assert len(files) == 2
    files[1].unlink()
    for said in [*pair.run(refusal, case, tmp_path), refusal(None, case, tmp_path)]:
        assert str(tmp_path) in said
        assert "remove it to start again" in said


@pytest.mark.parametrize("changes", BOTH, ids=str)
def test_each_process_holds_its_share(pair: Ranks, changes: dict[str, Any]) -> None:
    case = case_of(steps=1, batch_size=2, **changes)
    whole = bytes_held(None, case)
    for own in pair.run(bytes_held, case):
        assert own <= 0.55 * whole


def test_batches_that_do_not_divide_are_refused(pair: Ranks, tmp_path: Path) -> None:
    assert all("among 2 processes" in said for said in pair.run(refusal, case_of(steps=1, batch_size=3), tmp_path))


def test_the_static_router_measures_with_all_processes(pair: Ranks, tmp_path: Path) -> None:
    decoder = random_decoder("llama")
    parts = (decoder, SPACE, TABLE, toy_blocks())
    expected, weights = routed(None, *parts, tmp_path / "alone")
    for result, own in pair.run(routed, *parts, tmp_path / "pair"):
        assert result.num_measured == expected.num_measured
        assert result.spearman == pytest.approx(expected.spearman, abs=1e-6)
        assert [h["error"] for h in result.history] == pytest.approx([h["error"] for h in expected.history], abs=1e-5)
        for ours, theirs in zip(result.router.parameters(), expected.router.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(own[name], weights[name]) for name in weights)
    alone, together = (json.loads((tmp_path / of / "losses.json").read_text()) for of in ("alone", "pair"))
    assert together["identity"] == alone["identity"]
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-6)

"""The training loop: it learns, does not depend on how a batch is cut, and goes on after an interruption as if none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flextron.errors import FlextronError
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SearchSpace, SubnetSpec
from flextron.training.optimizer import learning_rate
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import TrainResult, train
from tests.toy import (
    CONTEXT,
    FULL_ONLY,
    SPACE,
    assert_same_training,
    same_weights,
    segment_logits,
    toy_blocks,
    toy_decoder,
    toy_recipe,
    weights_of,
)


class Interrupted(BaseException):
    """Stands in for a kill: nothing catches it."""


def run(
    recipe: TrainRecipe, *, student: int = 3, space: SearchSpace = SPACE, **options: Any
) -> tuple[Decoder, TrainResult]:
    """Train the random model of a seed against that of seed 3."""
    decoder = toy_decoder(student)
    return decoder, train(decoder, toy_decoder(3), space, toy_blocks(), recipe, **options)


@torch.no_grad()
def divergence(decoder: Decoder, spec: SubnetSpec) -> float:
    """KL from the original to a sub-network on all training tokens, from the logits of everything."""
    blocks = toy_blocks()
    tokens = blocks.batch(0, blocks.num_blocks)
    student = F.log_softmax(segment_logits(decoder, tokens, spec).flatten(0, 1), -1)
    teacher = F.log_softmax(segment_logits(toy_decoder(3), tokens, SPACE.full).flatten(0, 1), -1)
    return float(F.kl_div(student, teacher, log_target=True, reduction="batchmean"))


def test_sub_networks_come_closer_to_the_original() -> None:
    recipe = toy_recipe(steps=80, min_size=0.3, full_probability=0.2, random_probability=0.5, lr=5e-3)
    decoder, result = run(recipe)
    untrained = toy_decoder()
    narrow = SPACE.uniform(24, 1)
    for spec in (SPACE.smallest, narrow):
        assert divergence(decoder, spec) < 0.6 * divergence(untrained, spec)
    assert divergence(decoder, SPACE.full) < 0.5 * divergence(untrained, narrow)
    assert (result.num_steps, result.num_tokens, len(result.history)) == (80, 80 * 4 * CONTEXT, 80)
    assert all({"loss", "kl", "hidden", "lr"} <= step.keys() for step in result.history)


def test_the_loss_falls_towards_a_teacher_that_differs() -> None:
    _, result = run(toy_recipe(steps=60, lr=5e-3), student=4, space=FULL_ONLY)
    losses = [step["loss"] for step in result.history]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_model_is_given_back_as_one_that_is_used() -> None:
    decoder, _ = run(toy_recipe(steps=1, gradient_checkpointing=True))
    assert not decoder.training
    assert not decoder.gradient_checkpointing
    assert all(not p.requires_grad and p.grad is None for p in decoder.parameters())


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_micro_batches_are_one_batch(micro: int) -> None:
    # with one sub-network and all tokens, the cut of a batch is all that differs
    recipes = [
        toy_recipe(steps=4, batch_size=8, micro_batch_size=m, subnets_per_batch=1, kl_fraction=1.0, lr=1e-3)
        for m in (8, micro)
    ]
    (whole, first), (cut, second) = (run(recipe, student=4, space=FULL_ONLY) for recipe in recipes)
    for a, b in zip(first.history, second.history, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    before = weights_of(toy_decoder(4))
    assert not same_weights(weights_of(whole), before)
    ours, theirs = weights_of(cut), weights_of(whole)
    for name in before:
        # AdamW turns rounding in a gradient near 0 into a fraction of a step, at most 4 steps of 1e-3
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)


def test_recomputing_layers_changes_nothing() -> None:
    (plain, _), (recomputed, _) = (run(toy_recipe(steps=3, gradient_checkpointing=flag)) for flag in (False, True))
    for a, b in zip(weights_of(plain).values(), weights_of(recomputed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_embeddings_train_only_where_asked(case: str, train_embeddings: bool) -> None:
    decoder = toy_decoder(case=case)
    space = SearchSpace(num_hidden_layers=3, intermediate_sizes=(8, 40), num_groups=(1, decoder.config.num_groups))
    before = weights_of(decoder)
    recipe = toy_recipe(steps=3, full_probability=0.0, train_embeddings=train_embeddings)
    train(decoder, toy_decoder(case=case), space, toy_blocks(), recipe)
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    tables = {name for name in before if name.startswith(("embedding.", "positions.", "head."))}
    assert tables
    assert tables & moved == (tables if train_embeddings else set())
    assert {"layers.0.mlp.up.weight", "final_norm.weight"} <= moved


def resumable(steps: int = 8, **changes: Any) -> TrainRecipe:
    """A recipe that saves its state after every step."""
    return toy_recipe(steps=steps, checkpoint_minutes=1e-9, **changes)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    recipe = resumable(micro_batch_size=2)
    reference, whole = run(recipe)
    executed: list[int] = []

    def until(last: int) -> Any:
        def on_step(done: int, total: int, losses: dict[str, float]) -> None:
            executed.append(done)
            if done == last:
                raise Interrupted

        return on_step

    for last in (3, 6):
        with pytest.raises(Interrupted):
            run(recipe, run_directory=tmp_path / "run", on_step=until(last))
    decoder, result = run(
        recipe,
        run_directory=tmp_path / "run",
        on_step=lambda done, total, losses: executed.append(done),
    )
    # a step that was interrupted before its state was saved runs again, and no other
    assert executed == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    for ours, theirs in zip(result.history, whole.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same_training(decoder, reference, weights_of(toy_decoder()))


@pytest.mark.parametrize(
    ("recipe", "identity", "named"),
    [
        (resumable(lr=1e-4), {"text": "a"}, "recipe"),
        (resumable(seed=1), {"text": "a"}, "recipe"),
        (resumable(), {"text": "b"}, "text"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(
    recipe: TrainRecipe, identity: dict[str, Any], named: str, tmp_path: Path
) -> None:
    interrupt(tmp_path, {"text": "a"})
    with pytest.raises(FlextronError, match=rf"differs in {named};.*remove"):
        run(recipe, run_directory=tmp_path, identity=identity)


def interrupt(directory: Path, identity: dict[str, Any] | None = None) -> None:
    """Leave the state of a run that was interrupted."""

    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(resumable(), run_directory=directory, identity=identity, on_step=stop)


@pytest.mark.parametrize("name", ["*.safetensors", "run.json"])
def test_a_damaged_state_is_named(name: str, tmp_path: Path) -> None:
    interrupt(tmp_path)
    (file,) = tmp_path.rglob(name)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FlextronError, match=str(tmp_path)):
        run(resumable(), run_directory=tmp_path)


def test_states_hold_no_pickle(tmp_path: Path) -> None:
    interrupt(tmp_path)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FlextronError, match="micro"):
        run(toy_recipe(batch_size=8, micro_batch_size=3))


def test_a_gradient_that_is_no_number_stops_the_run() -> None:
    decoder = toy_decoder()
    decoder.final_norm.weight.data.fill_(1e30)
    with pytest.raises(FlextronError, match="learning rate"):
        train(decoder, toy_decoder(), FULL_ONLY, toy_blocks(), toy_recipe(steps=1, full_probability=1.0))


def test_bf16_stays_near_fp32() -> None:
    _, half = run(toy_recipe(steps=3, precision="bf16"), student=4, space=FULL_ONLY)
    _, full = run(toy_recipe(steps=3), student=4, space=FULL_ONLY)
    for a, b in zip(full.history, half.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
    assert half.history != full.history


def test_two_runs_of_one_process_may_differ_in_precision() -> None:
    (_, full), (_, half) = run(toy_recipe(steps=1), student=4), run(toy_recipe(steps=1, precision="bf16"), student=4)
    assert half.history[0]["loss"] == pytest.approx(full.history[0]["loss"], rel=0.05)


def test_the_rate_rises_linearly_and_falls_to_its_floor() -> None:
    recipe = toy_recipe(steps=100, lr=1.0, warmup_fraction=0.1, min_lr_ratio=0.2)
    rates = [learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize(("count", "shares"), [(1, [5]), (2, [3, 2]), (5, [1] * 5)])
def test_sequences_are_dealt_evenly_and_in_order(count: int, shares: list[int]) -> None:
    tokens = torch.arange(20).view(5, 4)
    specs = [SPACE.full, SPACE.smallest, SPACE.uniform(24, 1), SPACE.uniform(24, 2), SPACE.uniform(8, 2)][:count]
    batch = Batch.dealt(tokens, specs)
    assert [(s.spec, s.lengths) for s in batch.segments] == [(s, (4,) * n) for s, n in zip(specs, shares, strict=True)]
    assert torch.equal(batch.tokens_N, tokens.flatten())
    assert batch.positions_N.tolist() == [0, 1, 2, 3] * 5


def language_modelling(**changes: Any) -> TrainRecipe:
    """A recipe of the text alone."""
    return toy_recipe(kl_weight=0.0, hidden_weight=0.0, lm_weight=1.0, kl_fraction=1.0, **changes)


def test_without_a_teacher_the_text_alone_trains() -> None:
    decoder = toy_decoder()
    recipe = language_modelling(steps=60, full_probability=1.0, train_embeddings=True, lr=5e-3)
    train(decoder, None, SPACE, toy_blocks(), recipe)
    tokens = toy_blocks().batch(0, 16)

    def loss(model: Decoder) -> float:
        logits = segment_logits(model, tokens, SPACE.full).detach()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    assert loss(decoder) < 0.8 * loss(toy_decoder())


def test_a_teacher_that_is_not_asked_for_changes_nothing() -> None:
    with_one, without = toy_decoder(), toy_decoder()
    recipe = language_modelling(steps=3, sampling="random")
    train(with_one, toy_decoder(4), SPACE, toy_blocks(), recipe)
    train(without, None, SPACE, toy_blocks(), recipe)
    assert same_weights(weights_of(with_one), weights_of(without))


def test_a_teacher_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(FlextronError, match="teacher"):
        train(toy_decoder(), None, SPACE, toy_blocks(), toy_recipe(steps=1))


def test_a_recipe_without_any_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="all 0"):
        toy_recipe(kl_weight=0.0, hidden_weight=0.0, lm_weight=0.0)


def test_only_the_given_sub_networks_train() -> None:
    decoder, before = toy_decoder(), weights_of(toy_decoder())
    narrow = SPACE.uniform(24, 1)
    train(decoder, toy_decoder(4), SPACE, toy_blocks(), toy_recipe(steps=3), specs=[narrow])
    up, was = decoder.get_parameter("layers.0.mlp.up.weight"), before["layers.0.mlp.up.weight"]
    assert not torch.equal(up[:24], was[:24])
    assert torch.equal(up[24:], was[24:])
    with pytest.raises(FlextronError, match="not nested"):
        train(toy_decoder(), toy_decoder(4), SPACE, toy_blocks(), toy_recipe(), specs=[SPACE.uniform(48, 1)])


@pytest.mark.parametrize("sandwich", [False, True])
def test_in_a_sandwich_every_sequence_runs_in_all_sub_networks(sandwich: bool) -> None:
    specs = (SPACE.full, SPACE.uniform(24, 1), SPACE.smallest)
    recipe = toy_recipe(steps=1, subnets_per_batch=3, sandwich=sandwich, kl_fraction=1.0, hidden_weight=0.0)
    _, result = run(recipe, student=4, specs=specs)
    tokens = toy_blocks().batch(0, recipe.batch_size)
    teacher = F.log_softmax(segment_logits(toy_decoder(3), tokens, SPACE.full).flatten(0, 1), -1)
    divergences = [
        F.kl_div(
            F.log_softmax(segment_logits(toy_decoder(4), tokens, spec).flatten(0, 1), -1),
            teacher,
            log_target=True,
            reduction="batchmean",
        )
        for spec in specs
    ]
    everywhere = torch.stack(divergences).mean().item()
    assert (result.history[0]["kl"] == pytest.approx(everywhere, rel=1e-4)) == sandwich
    assert result.num_tokens == recipe.batch_size * CONTEXT


def test_a_resumed_run_must_train_the_same_sub_networks(tmp_path: Path) -> None:
    interrupt(tmp_path)
    with pytest.raises(FlextronError, match=r"differs in specs"):
        run(resumable(), run_directory=tmp_path, specs=[SPACE.full])

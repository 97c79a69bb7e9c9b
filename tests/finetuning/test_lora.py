"""The trainer of LoRA adapters against a plain loop of autograd and AdamW: in units, whole, killed and resumed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, load_peft_weights
from torch import Tensor
from torch.nn import functional as F

from flextron.checkpoints.peft.reading import read_adapter
from flextron.errors import FlextronError
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import UPDATE, LoraTrainer, LoraTrainers
from flextron.finetuning.trainer import StepMetrics, TrainingTask
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.jobs.scoring import score
from tests.random_decoders import ragged_specs, random_decoder

CHOSEN = Hyperparameters(n_epochs=3, batch_size=3, rank=4, alpha=8.0, learning_rate=0.02)


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        n = rng.randint(4, 14)
        mask = [0, *(int(i > n // 3) for i in range(1, n))]
        out.append(Example([rng.randrange(50) for _ in range(n)], mask))
    return out


def trainer(
    decoder: Decoder,
    data: Sequence[Example],
    resume: Path | None = None,
    validation: Sequence[Example] = (),
    chosen: Hyperparameters = CHOSEN,
    spec: SubnetSpec | None = None,
    **options: object,
) -> LoraTrainer:
    made_by = LoraTrainers(decoder, "base", **options)  # type: ignore[arg-type]
    return made_by(
        TrainingTask(hyperparameters=chosen, examples=data, validation=validation, seed=5, spec=spec, resume=resume)
    )


def finish(work: LoraTrainer, sizes: Sequence[int]) -> list[StepMetrics]:
    """Units of these sizes in turn."""
    out, k = [], 0
    while work.step_number < work.num_steps:
        metrics = work.run(sizes[k % len(sizes)])
        k += 1
        if metrics is not None:
            out.append(metrics)
    return out


def plain_losses(decoder: Decoder, adapter: Adapter, data: Sequence[Example]) -> list[float]:
    """By the textbook, from the adapter that a trainer begins with; the adapter is trained."""
    steps = math.ceil(len(data) / CHOSEN.batch_size)
    total = CHOSEN.n_epochs * steps
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=CHOSEN.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(total):
        epoch, index = divmod(step, steps)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        batch = [data[i] for i in order[index * CHOSEN.batch_size : (index + 1) * CHOSEN.batch_size]]
        logits, targets = [], []
        for e in batch:
            tokens = torch.tensor(e.tokens)
            out = decoder.logits(decoder(Batch.ragged([tokens], [decoder.widths], adapters=[adapter])))
            is_trained = torch.tensor(e.mask[1:], dtype=torch.bool)
            logits.append(out[:-1][is_trained])
            targets.append(tokens[1:][is_trained])
        loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        # nine steps: the first is the warm-up
        optimizer.param_groups[0]["lr"] = CHOSEN.learning_rate * (1.0 if step == 0 else (total - step) / (total - 1))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_curve_is_that_of_a_plain_loop(case: str) -> None:
    decoder, data = random_decoder(case), examples(8)
    first = trainer(decoder, data)
    losses = plain_losses(decoder, first.adapter, data)
    assert losses[-1] < losses[0] - 0.1
    for sizes, options in (([1000], {}), ([3, 7, 1], {}), ([5], {"pack_tokens": 10}), ([9], {"saved_gb": 1e-9})):
        work = trainer(decoder, data, **options)
        metrics = finish(work, sizes)
        assert [m.loss for m in metrics] == pytest.approx(losses, abs=1e-4)
        for ours, theirs in zip(work.adapter.parameters(), first.adapter.parameters(), strict=True):
            assert float((ours - theirs).detach().abs().max()) < 2e-3
        assert sum(m.num_tokens for m in metrics) == CHOSEN.n_epochs * sum(len(e.tokens) - 1 for e in data)
        assert all(m.accuracy is not None and 0 <= m.accuracy <= 1 for m in metrics)


def test_a_killed_job_takes_the_same_steps_again(tmp_path: Path) -> None:
    decoder, data = random_decoder("llama"), examples(8)
    whole = trainer(decoder, data)
    losses = [m.loss for m in finish(whole, [50])]
    for stop in (0, 1, 4):
        work = trainer(decoder, data)
        found = [work.step().loss for _ in range(stop)]
        work.run(4)  # a step that has begun is lost
        (tmp_path / str(stop)).mkdir()
        work.save_state(tmp_path / str(stop))
        again = trainer(decoder, data, resume=tmp_path / str(stop))
        assert again.step_number == stop
        found += [m.loss for m in finish(again, [50])]
        assert found == losses
        assert all(
            torch.equal(a, b) for a, b in zip(again.adapter.parameters(), whole.adapter.parameters(), strict=True)
        )


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_validation_is_that_of_a_plain_decoder_and_changes_nothing(case: str, tmp_path: Path) -> None:
    decoder, data, held_out = random_decoder(case), examples(8), examples(5, seed=3)
    chosen = replace(CHOSEN, checkpoint_every=2)
    alone = finish(trainer(decoder, data, chosen=chosen), [50])
    for sizes, options in (([1000], {}), ([3, 7, 1], {"pack_tokens": 10})):
        work = trainer(decoder, data, validation=held_out, chosen=chosen, **options)
        found: list[StepMetrics] = []
        while work.step_number < work.num_steps:
            metrics = work.run(sizes[len(found) % len(sizes)])
            if metrics is None:
                continue
            found.append(metrics)
            # at the end of each epoch of three steps, and after each second step
            assert (metrics.valid_loss is not None) == (work.step_number in (2, 3, 4, 6, 8, 9))
            if metrics.valid_loss is not None:
                loss, accuracy = score(decoder, work.adapter, held_out)
                assert metrics.valid_loss == pytest.approx(loss, abs=1e-5)
                assert metrics.valid_accuracy == pytest.approx(accuracy)
                assert metrics.num_valid_tokens == sum(len(e.tokens) - 1 for e in held_out)
        assert [m.loss for m in found] == pytest.approx([m.loss for m in alone], abs=1e-5)


def test_a_job_that_is_killed_while_it_validates(tmp_path: Path) -> None:
    decoder, data, held_out = random_decoder("llama"), examples(8), examples(5, seed=3)
    whole = trainer(decoder, data, validation=held_out)
    wanted = finish(whole, [50])
    for stop in (2, 8):
        work = trainer(decoder, data, validation=held_out)
        found = [work.step() for _ in range(stop)]
        while not work.unit.startswith("validation"):
            assert work.run(50) is None
        work.run(4)
        assert work.step_number == stop
        (tmp_path / str(stop)).mkdir()
        work.save_state(tmp_path / str(stop))
        again = trainer(decoder, data, resume=tmp_path / str(stop), validation=held_out)
        assert (again.step_number, again.unit) == (stop, "validation forward")
        assert found + finish(again, [50]) == wanted
        assert all(
            torch.equal(a, b) for a, b in zip(again.adapter.parameters(), whole.adapter.parameters(), strict=True)
        )


def test_a_state_of_another_job_is_refused(tmp_path: Path) -> None:
    decoder = random_decoder("llama")
    trainer(decoder, examples(8)).save_state(tmp_path)
    with pytest.raises(FlextronError, match="begin anew"):
        trainer(decoder, examples(12), resume=tmp_path)
    with pytest.raises(FlextronError, match="begin anew"):
        trainer(decoder, examples(8), resume=tmp_path, chosen=Hyperparameters(rank=2, batch_size=3))


def test_the_adapter_is_in_pefts_layout(tmp_path: Path) -> None:
    decoder = random_decoder("llama")
    work = trainer(decoder, examples(4))
    finish(work, [100])
    work.save_adapter(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "base"
    assert load_peft_weights(str(tmp_path))
    again = read_adapter(tmp_path, decoder)
    by_name: dict[str, Tensor] = dict(again.named_parameters())
    assert all(torch.equal(p, by_name[name]) for name, p in work.adapter.named_parameters())


def test_what_a_sub_network_learns_is_all_that_wider_ones_get() -> None:
    decoder = random_decoder("llama")
    spec = ragged_specs(decoder.config, 2)[0]
    work = trainer(decoder, examples(6), spec=spec)
    finish(work, [50])
    tokens = torch.tensor(examples(1)[0].tokens)
    narrow = work.adapter.narrowed(spec)
    wide = Adapter.lora(decoder.config, rank=CHOSEN.rank, alpha=CHOSEN.alpha)
    for i in range(len(spec.layers)):
        for target, bypass in wide.at(i).items():
            with torch.no_grad():
                for name, parameter in bypass.named_parameters():
                    own = dict(narrow.at(i)[target].named_parameters())[name] if target in narrow.at(i) else None
                    parameter.zero_()
                    if own is not None:
                        parameter[: len(own)] = own
    hidden = [decoder(Batch.ragged([tokens], [decoder.widths], adapters=[a])) for a in (work.adapter, wide)]
    assert torch.allclose(hidden[0], hidden[1], atol=1e-6)
    assert not torch.allclose(hidden[0], decoder(Batch.ragged([tokens], [decoder.widths])), atol=1e-3)


def test_units_tell_what_they_are() -> None:
    work = trainer(random_decoder("llama"), examples(3))
    kinds = []
    while work.step_number == 0:
        kinds.append(work.unit)
        assert work.num_left >= 1
        work.run(1000)
    assert kinds == ["forward"] * 3 + ["head"] + ["backward"] * 3 + [UPDATE]
    work = trainer(random_decoder("llama"), examples(3), validation=examples(2))
    kinds = []
    while work.step_number == 0:
        kinds.append(work.unit)
        work.run(1000)
    assert kinds[8:] == ["validation forward"] * 3 + ["validation head"]


def test_a_loss_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    decoder = random_decoder("llama")
    broken = trainer(decoder, examples(3))
    with torch.no_grad():
        next(iter(broken.adapter.parameters())).fill_(math.nan)
    broken.save_state(tmp_path)
    work = trainer(decoder, examples(3), resume=tmp_path)
    before = [p.clone() for p in work.adapter.parameters()]
    with pytest.raises(FlextronError, match="learning_rate_multiplier"):
        work.step()
    assert work.step_number == 0
    assert all(
        torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(work.adapter.parameters(), before, strict=True)
    )


def test_a_linear_that_the_model_lacks_is_refused() -> None:
    only_gate = Hyperparameters(target_modules=("gate_proj",))
    with pytest.raises(FlextronError, match="no linear 'gate'"):
        trainer(random_decoder("gpt2"), examples(3), chosen=only_gate)


def test_units_of_a_sub_network_are_of_other_kinds() -> None:
    """They take other times, and the scheduler knows units by their kinds; the optimizer's step is the same."""
    decoder, kinds = random_decoder("llama-3"), []
    for spec in (None, decoder.config.full_spec, ragged_specs(decoder.config, 2)[0]):
        work, found = trainer(decoder, examples(6), spec=spec), set()
        while work.step_number < 1:
            found.add(work.unit)
            work.run(16)
        kinds.append(found)
    assert kinds[0] == kinds[1]
    assert kinds[1] & kinds[2] == {UPDATE}

"""The distillation loss against plain autograd over all logits of every sub-network at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from flextron.training.objective import Objective, Teacher
from tests.checkpoints.families_cases import random_tokens
from tests.toy import SPACE, segment_logits, toy_decoder, toy_recipe

TOKENS = random_tokens(5, 9)
SPECS = [SPACE.full, SPACE.smallest]
SHARES = [3, 2]
"""Of the five sequences, as they are dealt to two sub-networks."""
ALL = torch.arange(TOKENS.numel())


def evaluate(student: Decoder, teacher: Decoder, rows: Tensor = ALL, **changes: Any) -> dict[str, Tensor]:
    """Our losses of `TOKENS`, dealt to `SPECS`."""
    objective = Objective(student, toy_recipe(**changes))
    losses: dict[str, Tensor] = objective(Batch.dealt(TOKENS, SPECS), Teacher(teacher, TOKENS)(TOKENS), rows)
    return losses


def reference_logits(student: Decoder) -> Tensor:
    """Logits of all sequences, each in its own sub-network run alone, (B, T, V)."""
    parts = zip(TOKENS.split(SHARES), SPECS, strict=True)
    return torch.cat([segment_logits(student, tokens, spec) for tokens, spec in parts])


def gradients(loss: Tensor, decoder: Decoder) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True))


def assert_same(ours: Tensor, reference: Tensor, student: Decoder) -> None:
    """Equal values, and equal gradients by every parameter."""
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(ours, student), gradients(reference, student), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.fixture
def student() -> Decoder:
    return toy_decoder(4).requires_grad_(True)


@pytest.fixture
def teacher() -> Decoder:
    return toy_decoder(3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_and_its_gradient_are_those_of_all_logits(
    student: Decoder, teacher: Decoder, temperature: float
) -> None:
    losses = evaluate(student, teacher, hidden_weight=0.0, temperature=temperature)
    assert losses.keys() == {"kl", "loss"}
    target = segment_logits(teacher, TOKENS, SPACE.full)
    reference = temperature**2 * F.kl_div(
        F.log_softmax(reference_logits(student).flatten(0, 1) / temperature, -1),
        F.log_softmax(target.flatten(0, 1) / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    assert_same(losses["loss"], reference, student)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "smollm3", "phi3", "granite", "olmo2", "stablelm"])
def test_losses_of_other_families_are_those_of_all_logits(case: str) -> None:
    student, teacher = toy_decoder(4, case).requires_grad_(True), toy_decoder(3, case)
    losses = evaluate(student, teacher, hidden_weight=0.0, lm_weight=1.0)
    target = F.log_softmax(segment_logits(teacher, TOKENS, SPACE.full).flatten(0, 1), -1)
    logits = reference_logits(student)
    kl = (target.exp() * (target - F.log_softmax(logits.flatten(0, 1), -1))).sum(-1).mean()
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert_same(losses["loss"], kl + lm, student)


def test_the_next_token_loss_never_crosses_sequences(student: Decoder, teacher: Decoder) -> None:
    losses = evaluate(student, teacher, kl_weight=0.0, hidden_weight=0.0, lm_weight=1.0)
    assert losses.keys() == {"lm", "loss"}
    logits = reference_logits(student)
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert_same(losses["loss"], reference, student)


def test_the_hidden_loss_is_the_quadratic_form_of_the_mean_prediction(student: Decoder, teacher: Decoder) -> None:
    losses = evaluate(student, teacher, kl_weight=0.0)
    assert losses.keys() == {"hidden", "loss"}
    p = torch.softmax(segment_logits(teacher, TOKENS, SPACE.full).flatten(0, 1), -1).mean(0)
    w = teacher.head_weight
    metric = w.t() @ (torch.diag(p) - torch.outer(p, p)) @ w
    h = torch.cat([student(Batch.padded(t, s)) for t, s in zip(TOKENS.split(SHARES), SPECS, strict=True)])
    error = h - teacher(Batch.padded(TOKENS, SPACE.full))
    assert_same(losses["loss"], 0.5 * torch.einsum("nd,de,ne->n", error, metric, error).mean(), student)


def test_drawn_rows_restrict_the_losses_of_the_vocabulary_only(student: Decoder, teacher: Decoder) -> None:
    rows = torch.tensor([0, 8, 9, 20, 44])
    some, everything = (evaluate(student, teacher, r, lm_weight=1.0) for r in (rows, ALL))
    torch.testing.assert_close(some["hidden"], everything["hidden"])
    student_p = F.log_softmax(reference_logits(student).flatten(0, 1), -1)
    teacher_p = F.log_softmax(segment_logits(teacher, TOKENS, SPACE.full).flatten(0, 1), -1)
    each = (teacher_p.exp() * (teacher_p - student_p)).sum(-1)
    torch.testing.assert_close(some["kl"], each[rows].mean(), rtol=1e-4, atol=1e-6)
    # tokens 8 and 44 end their sequences of 9
    followers = TOKENS.flatten()[torch.tensor([1, 10, 21])]
    expected = F.nll_loss(student_p[torch.tensor([0, 9, 20])], followers)
    torch.testing.assert_close(some["lm"], expected, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighted_sum(student: Decoder, teacher: Decoder) -> None:
    losses = evaluate(student, teacher, kl_weight=0.7, hidden_weight=1.3, lm_weight=0.2)
    expected = 0.7 * losses["kl"] + 1.3 * losses["hidden"] + 0.2 * losses["lm"]
    torch.testing.assert_close(losses["loss"], expected)


def test_an_equal_student_loses_nothing_at_full_width(teacher: Decoder) -> None:
    taught = Teacher(teacher, TOKENS)(TOKENS)
    spec: SubnetSpec = SPACE.full
    losses = Objective(toy_decoder(3), toy_recipe())(Batch.dealt(TOKENS, [spec]), taught, ALL)
    assert float(losses["loss"]) == pytest.approx(0, abs=1e-5)


def test_the_teacher_stays_out_of_the_graph(student: Decoder) -> None:
    teacher = toy_decoder(3).requires_grad_(True)
    evaluate(student, teacher, lm_weight=1.0)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert student.get_parameter("layers.0.mlp.up.weight").grad is not None


def test_a_draw_of_nothing_but_last_tokens_is_no_disaster(student: Decoder, teacher: Decoder) -> None:
    losses = evaluate(student, teacher, torch.tensor([8]), lm_weight=1.0)
    assert torch.isfinite(losses["loss"])

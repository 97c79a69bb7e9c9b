"""Shared beginnings: the same likelihoods as sequence by sequence, from fewer tokens."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.model.decoder import Decoder
from flextron.scoring.branches import Forest
from flextron.scoring.continuations import Continuation, score_continuations
from tests.checkpoints.families_cases import VOCAB
from tests.toy import SPACE, segment_logits, toy_decoder


def plain_score(decoder: Decoder, asked: Continuation) -> tuple[float, bool]:
    """From the logits of the whole sequence, run alone."""
    tokens = torch.tensor(asked.context + asked.continuation)
    logits = segment_logits(decoder, tokens[None, :-1], SPACE.full)[0]
    own = logits[-len(asked.continuation) :].double().log_softmax(-1)
    targets = torch.tensor(asked.continuation)
    return float(own.gather(1, targets[:, None]).sum()), bool((own.argmax(-1) == targets).all())


def questions(seed: int = 0) -> list[Continuation]:
    """Shots that all share, questions of several answers, some of one token; and strangers."""
    draw = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(VOCAB), k=count))

    shots = some(9)
    asked = []
    for _ in range(4):
        question = shots + some(draw.randint(1, 5))
        asked += [Continuation(question, some(draw.randint(1, 4))) for _ in range(3)]
        asked += [Continuation(question, (token,)) for token in range(3)]
    asked += [Continuation(some(draw.randint(1, 12)), some(draw.randint(1, 3))) for _ in range(3)]
    asked += [Continuation(shots, some(1)), asked[0]]
    draw.shuffle(asked)
    return asked


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_are_those_of_each_sequence_alone(case: str, batch_size: int) -> None:
    decoder = toy_decoder(case=case)
    asked = questions()
    # of the likeliest token, so that some answers are greedy
    first = segment_logits(decoder, torch.tensor([asked[0].context]), SPACE.full)[0, -1]
    asked.append(Continuation(asked[0].context, (int(first.argmax()),)))
    scores = score_continuations(decoder, asked, SPACE.full, batch_size=batch_size)
    expected = [plain_score(decoder, one) for one in asked]
    assert [score.log_likelihood for score in scores] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [score.is_greedy for score in scores] == [greedy for _, greedy in expected]
    assert scores[-1].is_greedy


def test_what_is_shared_runs_once() -> None:
    decoder = toy_decoder()
    seen = []
    decoder.embedding.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    context = tuple(range(10))
    asked = [Continuation(context, (a, b)) for a, b in itertools.product((1, 2), (3, 4))]
    score_continuations(decoder, asked, SPACE.full)
    assert seen == [12]


def test_progress_counts_continuations() -> None:
    seen: list[tuple[int, int]] = []
    asked = questions()
    score_continuations(
        toy_decoder(), asked, SPACE.full, batch_size=4, on_done=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (len(asked), len(asked))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(FlextronError, match="nothing to score"):
        Continuation((), (1,))
    with pytest.raises(FlextronError, match="nothing to score"):
        Continuation((1,), ())


def test_too_long_a_sequence_is_refused() -> None:
    decoder = toy_decoder(case="gpt2")
    too_long = (1,) * (decoder.config.max_position_embeddings + 1)
    with pytest.raises(FlextronError, match="positions"):
        score_continuations(decoder, [Continuation(too_long, (1,))], SPACE.full)


@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=8))
def test_a_forest_holds_its_sequences(sequences: set[tuple[int, ...]]) -> None:
    ordered = sorted(sequences)
    forest = Forest.of(ordered)
    flat = [token for part in forest.parts for token in part]
    assert all(forest.parts)
    assert len(flat) <= sum(map(len, ordered))
    for i, sequence in enumerate(ordered):
        rows = forest.last_rows(i, len(sequence))
        assert tuple(flat[row] for row in rows) == sequence
        assert forest.last_rows(i, 1) == rows[-1:]
    for part, stem in enumerate(forest.stems):
        assert stem is None or (stem < part and forest.stems[stem] is None)


def test_the_best_cut_is_found() -> None:
    # two questions share three tokens, their answers four more: apart they save more than as one
    a, b = (0, 0, 0, 1, 1, 1, 1), (0, 0, 0, 2, 2, 2, 2)
    forest = Forest.of([(*a, 5), (*a, 6), (*b, 5), (*b, 6)])
    assert sum(map(len, forest.parts)) == 18
    assert Forest.of([(1, 2), (3, 4)]).parts == ((1, 2), (3, 4))

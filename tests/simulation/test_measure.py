"""What is measured of an engine: fits against numbers that were put in, and the commands from profile to answer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from flextron.simulation.machine import Machine
from flextron.simulation.measure import _fit, _Sample, _unit
from tests.cli import test_cli
from tests.cli.test_cli import Places

made, run = test_cli.made, test_cli.run


def samples(seed: int, key_ms: float, pair_ms: float, held_up: float = 0.0) -> list[_Sample]:
    """Iterations that take 10 ms and 0.5 ms a token up to 16 tokens, 0.1 ms for each beyond."""
    rng, found = random.Random(seed), []
    for _ in range(800):
        size = rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 16, 24, 32, 48, 64])
        keys, pairs = rng.randrange(4000), rng.randrange(200_000)
        ms = 10 + 0.5 * min(size, 16) + 0.1 * max(0, size - 16) + key_ms * keys / 1e3 + pair_ms * pairs / 1e6
        found.append(_Sample(size, keys, pairs, ms * (8 if rng.random() < held_up else rng.uniform(0.97, 1.03))))
    return found


@pytest.mark.parametrize("held_up", [0.0, 0.03])
def test_a_bent_line_and_slopes_are_found_again(held_up: float) -> None:
    points, slopes = _fit(samples(0, 2.0, 30.0, held_up), None)
    assert slopes == (pytest.approx(2.0, rel=0.1), pytest.approx(30.0, rel=0.1))
    for size, ms in points:
        assert ms == pytest.approx(10 + 0.5 * min(size, 16) + 0.1 * max(0, size - 16), rel=0.06)
    assert [ms for _, ms in points] == sorted(ms for _, ms in points)


def test_slopes_that_are_given_stay() -> None:
    points, slopes = _fit(samples(1, 1.0, 15.0), (1.0, 15.0))
    assert slopes == (1.0, 15.0)
    assert dict(points)[64] == pytest.approx(22.8, rel=0.03)


def test_what_attention_does_not_cost_is_not_negative() -> None:
    _, (key_ms, pair_ms) = _fit(samples(2, 0.0, 0.0), None)
    assert 0 <= key_ms < 0.2
    assert 0 <= pair_ms < 3


def test_a_unit_has_a_fixed_part() -> None:
    rng = random.Random(3)
    times = [(n, (4 + 0.05 * n) * rng.uniform(0.98, 1.02)) for n in (32, 128, 512) * 20]
    found = _unit(times)
    assert (found.fixed_ms, found.token_ms) == (pytest.approx(4, rel=0.1), pytest.approx(0.05, rel=0.05))


def test_from_profile_to_answer(made: Places, tmp_path: Path, run: Any) -> None:
    directory, machine = tmp_path / "elastic", tmp_path / "machine.json"
    shutil.copytree(made.elastic, directory)
    done = run(
        "profile", directory, "--text", made.text, "--num-tokens", 256, "--decode-context", 32, "--rounds", 1,
        "--refinements", 0, "--prompts", "--engine", machine, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    measured = Machine.read(machine)
    assert measured.training is not None
    assert measured.context == 256
    assert min(measured.jitter) < 1 < max(measured.jitter)
    for source in (directory, machine):
        answer = run(
            "simulate", source, "--replicas", 2, "--rate", 2, "--num-requests", 20, "--prompt-tokens", "40",
            "--slo-tpot-ms", 1000, "--finetune", "20-60", "--json",
        )  # fmt: skip
        assert answer.code == 0, answer.err
        alone, beside = json.loads(answer.out)["results"]
        assert alone["summary"]["attainment"] > 0.9
        assert beside["finetuned_tokens_per_s"] > 0

"""The answers: against queueing theory, against each other, from checkpoints, and on the command line."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

import flextron
from flextron.bench.metrics import Objectives
from flextron.bench.plan import Arrivals, Load
from flextron.engine import EngineSettings
from flextron.errors import FlextronError
from flextron.serving.balancing import LeastOutstanding
from flextron.simulation import Machine, Scenario, simulate
from flextron.simulation.cluster import Cluster, Policies
from flextron.simulation.profile import machine_of
from flextron.simulation.replica import Arrival
from flextron.simulation.times import PICOSECONDS
from tests.cli import test_cli
from tests.cli.test_cli import Places, assert_refused
from tests.simulation.test_machine import NUMBERS

made, run = test_cli.made, test_cli.run

MACHINE = Machine.from_dict(
    {**NUMBERS, "kv_cache_tokens": 20_000, "sub_networks": [{"latency": 0.5, "loss": 3.0}], "max_num_seqs": 16}
)
LOAD = Load(
    arrivals=Arrivals(rate=30.0), num_requests=400, prompt_tokens="exponential:120", output_tokens="exponential:40"
)
TIGHT = Objectives(ttft_ms=150, tpot_ms=14)


def test_one_at_a_time_waits_as_queueing_theory_says() -> None:
    """One request at a time, one iteration each, is M/D/1: the mean wait is rho * s / (2 * (1 - rho))."""
    machine = Machine.from_dict(
        {
            "name": "clerk",
            "iteration_ms": {"1": 100.0, "2": 100.0},
            "kv_cache_tokens": 1000,
            "context": 100,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
        }
    )
    rng, now, load = random.Random(1), 0.0, []
    for i in range(20_000):
        now += rng.expovariate(7.0)
        load.append(Arrival(i, round(now * PICOSECONDS), 1, 1))
    settings = EngineSettings(max_num_seqs=1, max_num_batched_tokens=1, prefix_caching=False)
    cluster = Cluster(machine, settings, 1, Policies(objectives=Objectives(), max_queue=10**6))
    served = cluster.run(load, now, num_arrivals=len(load)).served
    wait = sum(s.first_ps - s.arrival.ps for s in served) / len(served) / PICOSECONDS - 0.1
    assert wait == pytest.approx(0.7 * 0.1 / (2 * 0.3), rel=0.06)


def test_the_fewest_replicas_reach_the_attainment_and_one_less_does_not() -> None:
    scenario = Scenario(objectives=TIGHT, attainment=0.9)
    (found,) = simulate(MACHINE, LOAD, scenario)
    assert found.num_replicas > 1
    around = simulate(MACHINE, LOAD, scenario, replicas=[found.num_replicas - 1, found.num_replicas])
    assert around[1] == found
    assert around[0].summary.attainment is not None
    assert found.summary.attainment is not None
    assert around[0].summary.attainment < 0.9 <= found.summary.attainment


def test_elasticity_helps_and_says_what_it_costs() -> None:
    scenario = Scenario(objectives=TIGHT, min_latency_target=0.5)
    fixed, elastic = simulate(MACHINE, LOAD, scenario, replicas=1)
    assert (fixed.is_elastic, elastic.is_elastic) == (False, True)
    assert elastic.summary.attainment > fixed.summary.attainment  # type: ignore[operator]
    assert (fixed.narrowed, fixed.mean_target) == (0.0, 1.0)
    assert elastic.narrowed > 0
    assert 0.5 < elastic.mean_target < 1
    assert simulate(MACHINE, LOAD, scenario)[1].num_replicas <= simulate(MACHINE, LOAD, scenario)[0].num_replicas


def test_finetuning_takes_what_serving_leaves() -> None:
    scenario = Scenario(objectives=Objectives(ttft_ms=2000, tpot_ms=60), finetune="20-60")
    few, many = (simulate(MACHINE, LOAD, scenario, replicas=n)[1] for n in (1, 3))
    assert few.finetuned_tokens_per_s is not None
    assert many.finetuned_tokens_per_s is not None
    # a layer forward and backward takes at least 0.3 ms a token, and there are three
    assert few.finetuned_tokens_per_s < many.finetuned_tokens_per_s < 3 * 1000 / 0.9
    assert many.summary.attainment is not None
    assert many.summary.attainment >= 0.99


def test_a_load_is_repeated_and_equal_seeds_give_equal_answers() -> None:
    once, again = (simulate(MACHINE, LOAD, replicas=2)[0] for _ in range(2))
    assert once == again
    thrice = simulate(MACHINE, LOAD, Scenario(repeat=3), replicas=2)[0]
    assert thrice.summary.num_requests == 1200
    assert thrice.seconds == pytest.approx(3 * once.seconds, rel=0.1)


def test_full_queues_refuse() -> None:
    result = simulate(MACHINE, LOAD, Scenario(objectives=TIGHT, max_queue=0, max_num_seqs=1), replicas=1)[0]
    assert result.summary.errors == {"refused": result.summary.num_requests - result.summary.num_ok}
    assert 0 < result.summary.num_ok < 400


def test_the_balancer_gives_to_the_least_loaded_in_turns() -> None:
    balancer = LeastOutstanding(3)
    assert [balancer.choose() for _ in range(4)] == [0, 1, 2, 0]
    balancer.ended(1)
    assert balancer.choose() == 1
    # open now: 2, 1, 1
    assert [balancer.choose() for _ in range(3)] == [2, 1, 2]
    with pytest.raises(FlextronError, match="at least 1"):
        LeastOutstanding(0)


@pytest.mark.parametrize(
    ("load", "scenario", "replicas", "reason"),
    [
        (Load(), Scenario(), 1, "needs times of arrival"),
        (LOAD, Scenario(), None, "follows from objectives"),
        (LOAD, Scenario(), 0, "from 1 to 1,000"),
        (LOAD, Scenario(repeat=0), 1, "repeated from 1"),
        (LOAD, Scenario(min_latency_target=0.5), 1, "needs an objective"),
        (LOAD, Scenario(objectives=TIGHT, min_latency_target=2.0), 1, "in \\(0, 1\\]"),
        (LOAD, Scenario(finetune="long"), 1, "lengths are given as"),
        (LOAD, Scenario(objectives=Objectives(ttft_ms=1.0)), None, "not even 1,000"),
        (LOAD, Scenario(max_num_seqs=1000), 1, "must be at least max_num_seqs"),
        (LOAD, Scenario(max_queue=-1), 1, "max_queue"),
    ],
)
def test_what_cannot_be_answered_is_refused(load: Load, scenario: Scenario, replicas: Any, reason: str) -> None:
    with pytest.raises(FlextronError, match=reason):
        simulate(MACHINE, load, scenario, replicas=replicas)


def test_a_profiled_checkpoint_is_a_machine(made: Places, tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match="--prompts"):
        machine_of(made.profiled)
    with pytest.raises(FlextronError, match="no measured frontier"):
        machine_of(made.elastic)
    model = flextron.load(made.profiled)
    table = model.measure_latencies(phase="prefill", context=64)
    decode = next(t for t in model.tables.values() if t.phase == "decode")
    path = tmp_path / "profiled"
    model.save(path)
    for weights in path.glob("*.safetensors"):
        weights.unlink()  # they are not read
    machine = machine_of(path)
    assert model.frontier is not None
    best = model.frontier.best()
    assert [n.latency for n in machine.networks][1:] == [p.latency for p in best if p.latency < 1]
    for network, point in zip(
        machine.networks, [model.frontier.full, *(p for p in best if p.latency < 1)], strict=True
    ):
        low = decode.predict_ms(point.spec)
        assert network.ms(1) == pytest.approx(low)
        assert network.ms(64) == pytest.approx(max(low, table.predict_ms(point.spec)))
        assert network.loss == point.loss
    assert machine.kv_cache_tokens == 10**9 // model.frontier.full.kv_bytes_per_token
    assert flextron.simulate(machine, Load(arrivals=Arrivals(rate=5), num_requests=20), replicas=1)


def test_the_command_prints_a_table_and_json(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine.json"
    MACHINE.write(path)
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--rate", 20, "--num-requests", 40, "--slo-ttft-ms", 400, "--slo-tpot-ms", 20)
    options = (*options, "--min-latency-target", 0.5, "--finetune", "20-60")
    table = run("simulate", path, "--replicas", "1,2", *options)
    assert table.code == 0
    assert max(map(len, table.out.splitlines())) <= 80
    assert "attainment" in table.out
    found = run("simulate", path, "--replicas", "1,2", *options, "--json")
    results = json.loads(found.out)["results"]
    ways = [(r["num_replicas"], r["is_elastic"], r["is_finetuning"]) for r in results]
    assert ways == [(n, e, f) for n in (1, 2) for e in (False, True) for f in (False, True)]
    assert all(0 <= r["summary"]["attainment"] <= 1 and math.isfinite(r["busy"]) for r in results)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--replicas", "some"), "whole numbers"),
        (("--replicas", "2000"), "from 1 to 1,000"),
        (("--trace", "none.csv", "--replicas", "1"), "none.csv does not exist"),
        (("--rate", "0", "--replicas", "1"), "rate"),
        (("--kv-cache-gb", "2", "--replicas", "1"), "kv_cache_tokens"),
        ((), "follows from objectives"),
        (("--attainment", "1.5"), "attainment"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path: Path, run: Any, options: tuple[str, ...], reason: str) -> None:
    path = tmp_path / "machine.json"
    MACHINE.write(path)
    assert_refused(run("simulate", path, *options), reason)


@pytest.mark.parametrize(
    ("scenario", "key"),
    [
        (Scenario(objectives=TIGHT, min_latency_target=0.5), "sub_networks"),
        (Scenario(objectives=TIGHT, finetune="40-80"), "training"),
    ],
)
def test_what_the_machine_does_not_tell_is_refused(scenario: Scenario, key: str) -> None:
    few = {k: v for k, v in NUMBERS.items() if k not in ("sub_networks", "training")}
    with pytest.raises(FlextronError, match=f"add the key {key} to its file"):
        simulate(Machine.from_dict(few), LOAD, scenario, replicas=1)


def test_the_machine_of_the_guide_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "simulate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    machine = Machine.from_dict(json.loads(block))
    # 13.5 GB of weights at 70 % of 3.35 TB/s, and 13.4 GFLOP a token at 40 % of 989 TFLOP/s
    assert machine.networks[0].ms(1) == pytest.approx(13.5 / (0.7 * 3.35), rel=0.01)
    assert machine.networks[0].ms(2048) == pytest.approx(2048 * 13.4 / (0.4 * 989), rel=0.01)
    load = Load(arrivals=Arrivals(rate=20), num_requests=50)
    found = simulate(machine, load, Scenario(objectives=TIGHT, min_latency_target=0.5, finetune="40-80"), replicas=1)
    assert [r.is_finetuning for r in found] == [False, True, False, True]


def test_a_missing_machine_is_refused(tmp_path: Path, run: Any) -> None:
    assert_refused(run("simulate", tmp_path / "none.json", "--replicas", 1), "does not exist")

"""The latency table: what the fit makes of known costs, and that what is timed is what was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.attention import CachedAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.routing import LatencyTable, device_fingerprint, measure_table
from flextron.routing import latency as module
from flextron.routing.latency import step_latencies_ms
from flextron.spec import SearchSpace, SubnetSpec
from tests.toy import SPACE, synthetic_latencies, synthetic_ms, toy_decoder

WIDE = SearchSpace(
    num_hidden_layers=6,
    intermediate_sizes=(10, 20, 30, 40),
    num_groups=(1, 2, 4),
    skippable_layers=(2, 3),
    max_skipped_layers=2,
)


@pytest.mark.parametrize("space", [SPACE, WIDE])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fit_recovers_additive_costs(space: SearchSpace, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "step_latencies_ms", synthetic_latencies)
    decoder = toy_decoder()
    table = measure_table(decoder, space, batch_size=3, context=17, seed=seed)
    assert table.base_ms == pytest.approx(1.5)
    assert table.mlp_ms == pytest.approx({w: 0.02 * w for w in space.intermediate_sizes})
    assert table.attention_ms == pytest.approx({g: 0.75 * g for g in space.num_groups})
    assert (table.batch_size, table.context) == (3, 17)
    assert table.device == device_fingerprint(torch.device("cpu"), torch.float32)
    assert table.full_ms == pytest.approx(synthetic_ms(space.full))
    assert table.max_error < 1e-6
    for spec in (space.smallest, space.full, space.uniform(space.intermediate_sizes[1], 1)):
        assert table.predict_ms(spec) == pytest.approx(synthetic_ms(spec))
        assert table.predict(spec) == pytest.approx(synthetic_ms(spec) / synthetic_ms(space.full))
        layers_ms = sum(table.layer_ms(layer) for layer in spec.layers)
        assert table.base_ms + layers_ms == pytest.approx(synthetic_ms(spec))


@pytest.mark.parametrize(("factor", "warns"), [(1.1, False), (1.5, True)])
def test_the_error_is_that_on_networks_the_fit_did_not_see(
    monkeypatch: pytest.MonkeyPatch, factor: float, warns: bool
) -> None:
    asked: list[SubnetSpec] = []

    def slower(decoder: Decoder, specs: list[SubnetSpec], **_: object) -> list[float]:
        """The last networks, which no fit may use, take longer than the additive model has it."""
        asked.extend(specs)
        held_out = len(specs) - module._NUM_HELD_OUT
        return [synthetic_ms(spec) * (1.0 if k < held_out else factor) for k, spec in enumerate(specs)]

    monkeypatch.setattr(module, "step_latencies_ms", slower)
    table = measure_table(toy_decoder(), WIDE)
    assert table.median_error == pytest.approx(1 - 1 / factor)
    assert table.max_error == pytest.approx(1 - 1 / factor)
    assert (table.warning is not None) == warns
    if table.warning is not None:
        assert "off by 33%" in table.warning
    assert table.base_ms == pytest.approx(1.5)
    assert asked[0] == WIDE.full


def test_json_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "step_latencies_ms", synthetic_latencies)
    table = measure_table(toy_decoder(), SPACE)
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@pytest.mark.parametrize("data", [{}, {"mlp_ms": {}, "attention_ms": {}}, {"mlp_ms": [1], "attention_ms": {}}])
def test_a_damaged_table_says_how_to_make_a_new_one(data: dict[str, object]) -> None:
    with pytest.raises(FlextronError, match="profile"):
        LatencyTable.from_dict(data)


@pytest.mark.parametrize("spec", [SPACE.full, SPACE.smallest, SubnetSpec.of([24, 0, 8], [0, 1, 2])])
def test_a_probe_runs_one_decode_step_of_the_stated_network(spec: SubnetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = toy_decoder()
    steps: list[tuple[Batch, list[int]]] = []
    forward = Decoder.forward

    def recorded(self: Decoder, batch: Batch, attention: CachedAttention) -> Tensor:
        seen: list[int] = []

        def spied(*args: object) -> Tensor:
            seen.append(int(args[0]))  # type: ignore[call-overload]
            return attention(*args)  # type: ignore[arg-type]

        hidden: Tensor = forward(self, batch, spied)  # type: ignore[arg-type]
        steps.append((batch, seen))
        assert hidden.isfinite().all()
        return hidden

    monkeypatch.setattr(Decoder, "forward", recorded)
    monkeypatch.setattr("flextron.generation.decoding.why_not_native", lambda _: "this test looks into the operators")
    times = step_latencies_ms(decoder, [spec], batch_size=3, context=20, repeats=2)
    assert len(times) == 1
    assert times[0] > 0
    assert len(steps) == 3, "two timed steps after one that warms up"
    for batch, attended in steps:
        assert [(s.spec, s.lengths) for s in batch.segments] == [(spec, (1, 1, 1))]
        assert batch.positions_N.tolist() == [20, 20, 20]
        assert attended == [i for i, layer in enumerate(spec.layers) if layer.num_groups]


def test_times_are_medians_taken_round_robin_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # warm-up, then three rounds over two networks
    scripted = iter([99.0, 98.0, 1.0, 10.0, 5.0, 30.0, 2.0, 20.0])
    order: list[int] = []

    def run_ms(self: object) -> float:
        order.append(id(self))
        return next(scripted)

    monkeypatch.setattr(module._Probe, "run_ms", run_ms)
    rounds: list[tuple[int, int]] = []
    times = step_latencies_ms(
        toy_decoder(),
        [SPACE.full, SPACE.smallest],
        repeats=3,
        on_progress=lambda done, total: rounds.append((done, total)),
    )
    assert times == [2.0, 20.0]
    assert order == order[:2] * 4
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_measured_table_is_about_right() -> None:
    """On real timings of a tiny model only the rough size can be held."""
    table = measure_table(toy_decoder(), SPACE, context=8, repeats=3)
    assert 0 < table.base_ms + table.layer_ms(SPACE.full.layers[0]) < 1e4
    assert 0.2 < table.predict_ms(SPACE.full) / table.full_ms < 5


@pytest.fixture
def one_thread_more() -> Iterator[int]:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    yield threads + 1
    torch.set_num_threads(threads)


def test_threads_and_precision_make_another_device(one_thread_more: int) -> None:
    cpu = torch.device("cpu")
    name = device_fingerprint(cpu, torch.float32)
    assert f"{one_thread_more}-threads" in name
    assert "/" not in name
    assert name == name.lower()
    assert device_fingerprint(cpu, torch.bfloat16) != name
    torch.set_num_threads(one_thread_more + 1)
    assert device_fingerprint(cpu, torch.float32) != name

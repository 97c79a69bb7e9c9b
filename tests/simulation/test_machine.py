"""A machine's numbers: read, refused, and turned into times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.simulation.machine import Machine
from flextron.simulation.times import Chunk, IterationTimes

NUMBERS: dict[str, Any] = {
    "name": "invented",
    "source": "nowhere",
    "iteration_ms": {"1": 10.0, "64": 14.0, "512": 40.0},
    "sub_networks": [
        {"latency": 0.5, "loss": 2.5, "kv_share": 0.25},
        {"latency": 0.8, "iteration_ms": {"2": 9.0, "8": 9.5}},
    ],
    "kv_cache_tokens": 1000,
    "context": 500,
    "jitter": [0.9, 1.1],
    "training": {
        "num_layers": 3,
        "forward": {"fixed_ms": 1.0, "token_ms": 0.1},
        "head": {"fixed_ms": 0.5, "token_ms": 0.2},
        "backward": {"fixed_ms": 2.0, "token_ms": 0.2},
        "update": {"fixed_ms": 4.0, "token_ms": 0.0},
    },
}


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    machine = Machine.from_dict(NUMBERS)
    assert [n.latency for n in machine.networks] == [1.0, 0.8, 0.5]
    assert machine.networks[2].points == ((1, 5.0), (64, 7.0), (512, 20.0))
    machine.write(tmp_path / "machine.json")
    assert Machine.read(tmp_path / "machine.json") == machine


@given(size=st.integers(1, 512))
def test_times_lie_on_straight_lines_between_the_points(size: int) -> None:
    expected = np.interp(size, [1, 64, 512], [10.0, 14.0, 40.0])
    assert Machine.from_dict(NUMBERS).networks[0].ms(size) == pytest.approx(expected)


def test_beyond_the_last_point_the_line_goes_on() -> None:
    assert Machine.from_dict(NUMBERS).networks[0].ms(960) == pytest.approx(66.0)


@given(counts=st.tuples(*[st.integers(0, 40)] * 3).filter(any))
def test_tokens_of_several_widths_share_the_rows_of_the_narrower_ones(counts: tuple[int, int, int]) -> None:
    """Slice by slice: the rows of each width are computed for all tokens that are as wide."""
    machine = Machine.from_dict({**NUMBERS, "sub_networks": [{"latency": 0.8}, {"latency": 0.5}]})
    full, shares, ms = machine.networks[0], [1.0, 0.8, 0.5], 0.0
    present = [share for share, count in zip(shares, counts, strict=True) if count]
    for upper, lower in zip(present, [*present[1:], 0.0], strict=True):
        as_wide = sum(count for share, count in zip(shares, counts, strict=True) if share >= upper)
        ms += (upper - lower) * full.ms(as_wide)
    assert IterationTimes(machine).sizes(counts) == pytest.approx(ms * 1e6, abs=2)


def test_attention_is_counted_in_keys_and_pairs() -> None:
    machine = Machine.from_dict({**NUMBERS, "ms_per_1000_keys": 3.0, "ms_per_1000000_pairs": 500.0})
    times = IterationTimes(machine)
    chunks = [Chunk(0, 9, 1), Chunk(2, 19, 1), Chunk(0, 4, 3)]
    # keys of the narrow one are a quarter as large; positions 4, 5 and 6 attend to 5, 6 and 7 keys
    expected = (10 * 3.0 + 20 * 3.0 / 4) / 1e3 + (5 + 6 + 7) * 500 / 1e6
    assert times.iteration(chunks) - times.sizes((4, 0, 1)) == pytest.approx(expected * 1e6, abs=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"iteration_ms": {"1": 5.0}}, "iteration_ms"),
        ({"iteration_ms": {"1": 5.0, "8": 4.0}}, "must take longer"),
        ({"iteration_ms": {"none": 5.0, "8": 4.0}}, "iteration_ms"),
        ({"iteration_ms": {"1": float("nan"), "8": 4.0}}, "iteration_ms"),
        ({"sub_networks": [{"latency": 1.5}]}, "sub_networks.0.latency"),
        ({"sub_networks": [{"latency": 0.5}, {"latency": 0.5}]}, "different latencies"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens"),
        ({"max_num_seqs": 300}, "must be at least max_num_seqs"),
        ({"training": {"num_layers": 3}}, "training.forward"),
        ({"speed": 3}, "speed"),
        ({"jitter": [0.0]}, "jitter.0"),
        ({"name": None}, "name"),
    ],
)
def test_numbers_of_no_machine_are_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**NUMBERS, **change}))
    with pytest.raises(FlextronError, match=reason) as caught:
        Machine.read(path)
    assert "\n" not in str(caught.value)

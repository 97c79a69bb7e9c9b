"""How many replicas the load needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("ray.serve")

from flextron.replicas.application import desired, scale  # noqa: E402

CAPS = st.lists(st.sampled_from([1.0, 0.8, 0.6, 0.5]), min_size=1, max_size=5)


def test_the_queue_alone() -> None:
    assert desired(0, [1.0, 1.0], 2, 48) == 0
    assert desired(96, [1.0, 1.0], 2, 48) == 2
    assert desired(240, [], 0, 48) == 5


def test_narrowed_requests_ask_for_the_rest_of_their_width() -> None:
    # two replicas at half the time each do the work of one at full width, twice as fast
    assert desired(10, [0.5, 0.5], 2, 48) == 4
    assert desired(480, [0.5, 0.5], 2, 48) == 10


@given(st.floats(0, 1e4), CAPS, st.floats(1, 100))
def test_more_load_never_asks_for_fewer(load: float, caps: list[float], each: float) -> None:
    count = len(caps)
    assert desired(load + 1, caps, count, each) >= desired(load, caps, count, each)
    narrower = [cap * 0.9 for cap in caps]
    assert desired(load, narrower, count, each) >= desired(load, caps, count, each)
    if min(caps) < 1:
        assert desired(load, caps, count, each) > count


@pytest.mark.parametrize(
    ("requests", "caps", "wanted"),
    [(0, [1.0, 1.0], 2), (100, [1.0, 1.0], 3), (0, [0.5, 1.0], 3), (9999, [1.0, 1.0], 4)],
)
def test_as_serve_asks(requests: float, caps: list[float], wanted: int) -> None:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    context = AutoscalingContext(
        deployment_id=None,
        deployment_name="Replica",
        app_name="flextron",
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={"latency_cap": dict(enumerate(caps))},
        raw_metrics={},
        capacity_adjusted_min_replicas=2,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(min_replicas=2, max_replicas=4, target_ongoing_requests=48),
    )
    assert scale(context) == (wanted, {})

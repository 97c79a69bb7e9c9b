"""The frontier search on a tiny model: what it reports is what the sub-networks do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flextron.model.cost import num_parameters
from flextron.routing import Frontier, SearchSettings, search_frontier
from tests.checkpoints.families_cases import random_tokens
from tests.toy import SPACE, TABLE, segment_logits, synthetic_ms, toy_decoder

CALIBRATION, VALIDATION = random_tokens(2, 10, seed=1), random_tokens(6, 10, seed=2)
SETTINGS = SearchSettings(targets=(0.9, 0.75, 0.6), rounds=2, refinements=2, num_uniform=3)
DECODER = toy_decoder()


def search(settings: SearchSettings = SETTINGS, **options: object) -> Frontier:
    return search_frontier(
        DECODER,
        SPACE,
        TABLE,
        calibration_BT=CALIBRATION,
        validation_BT=VALIDATION,
        text="some text",
        settings=settings,
        **options,  # type: ignore[arg-type]
    )


def test_points_are_measured_sub_networks_of_the_space() -> None:
    frontier = search()
    assert (frontier.device, frontier.text) == ("a-quiet-machine", "some text")
    assert frontier.points[0].spec == SPACE.full
    assert frontier.points[0].latency == pytest.approx(1)
    specs = [p.spec for p in frontier.points]
    assert len(set(specs)) == len(specs) >= 6
    assert SPACE.smallest in specs
    for point in frontier.points:
        SPACE.check(point.spec)
        with torch.no_grad():
            logits = segment_logits(DECODER, VALIDATION, point.spec)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), VALIDATION[:, 1:].flatten())
        assert point.loss == pytest.approx(float(loss), rel=1e-5)
        assert point.latency_ms == pytest.approx(synthetic_ms(point.spec))
        assert point.latency == pytest.approx(synthetic_ms(point.spec) / synthetic_ms(SPACE.full))
        assert point.params == num_parameters(DECODER.config, point.spec)
        assert point.mem_bytes == 4 * point.params


def test_every_target_is_reached_and_every_way_of_finding_tried() -> None:
    frontier = search(SearchSettings(targets=(0.9, 0.75, 0.6), rounds=2, refinements=3, num_uniform=3))
    kinds = {kind: [p for p in frontier.points if p.kind == kind] for kind in ("uniform", "guided", "refined")}
    assert sum(map(len, kinds.values())) == len(frontier.points)
    assert all(kinds.values())
    assert all(p.spec.is_uniform for p in kinds["uniform"])
    for target in (0.9, 0.75, 0.6):
        assert any(target - 0.2 < p.latency <= target + 1e-9 for p in kinds["guided"] + kinds["refined"])


def test_the_search_depends_on_its_seed_alone() -> None:
    first, second = search(), search()
    assert [(p.spec, p.kind) for p in first.points] == [(p.spec, p.kind) for p in second.points]
    # the last bits of a loss depend on where its tensors lie
    assert [p.loss for p in first.points] == pytest.approx([p.loss for p in second.points])


def test_progress_never_runs_over() -> None:
    seen: list[tuple[int, int]] = []
    search(on_progress=lambda done, total: seen.append((done, total)))
    assert all(0 < done <= total for done, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1

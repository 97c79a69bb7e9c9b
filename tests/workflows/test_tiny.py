"""The tiny demo on the trained model that the package holds: what it says is what the model does."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

import flextron
from flextron.api import evaluation_text
from flextron.routing import latency as latency_module
from flextron.spec import SubnetSpec
from flextron.training.router_recipe import RouterRecipe
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.workflows.tiny import TinySettings, run_tiny, tiny_model
from tests.toy import Stages, synthetic_latencies

MOST_BYTES = 20_000_000


def test_the_model_is_small_and_its_card_says_the_losses_that_it_has() -> None:
    assert sum(f.stat().st_size for f in tiny_model().rglob("*")) < MOST_BYTES
    card = (tiny_model() / "README.md").read_text(encoding="utf-8")
    elastic = json.loads((tiny_model() / "elastic.json").read_text(encoding="utf-8"))
    points = elastic["recipe"]["points"]
    assert [p["size"] for p in points] == [1.0, 0.75, 0.55, 0.4]
    assert all(f"{p['loss']:.4f}" in card for p in points)
    assert all(a["loss"] < b["loss"] for a, b in pairwise(points))


def test_its_sub_networks_have_learned_english() -> None:
    model = flextron.load(tiny_model())
    points = model.info.recipe["points"]
    specs = {str(p["size"]): SubnetSpec.from_dict(p["spec"]) for p in points}
    found = model.evaluate(specs, evaluation_text(), num_tokens=2048, context=128)
    losses = [found[name].loss for name in specs]
    assert losses == sorted(losses)
    # a guess among the vocabulary's words
    assert losses[0] < 0.8 * math.log(model.decoder.config.vocab_size)
    assert model.router is not None
    assert model.token_router is not None


def test_everything_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
    settings = TinySettings(
        output=tmp_path / "tiny",
        targets=(1.0, 0.8, 0.7),
        router=RouterRecipe(num_measured=32),
        tokens=TokenRouterRecipe(warm_tokens=2048, warm_epochs=4, num_draws=1, joint_steps=0),
        num_tokens=2048,
    )
    rows = run_tiny(settings, Stages())
    assert [row["target"] for row in rows] == [1.0, 0.8, 0.7]
    perplexities = [row["static_router"] for row in rows]
    assert all(tight > 0.95 * loose for loose, tight in pairwise(perplexities))
    # on text of another domain the two are close
    assert all(row["static_router"] < 1.03 * row["uniform"] for row in rows[1:])
    assert (settings.output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    model = flextron.load(settings.output / "elastic")
    assert model.router is not None
    (table,) = model.tables.values()
    for row in rows:
        spec = model.router.spec(row["target"], table)
        assert table.predict(spec) <= row["target"] * (1 + 1e-9)
        assert row["parameters"] == model.num_parameters(spec)
        assert row["text"] == model.generate("The city was", spec=spec, max_tokens=24)
    run_tiny(settings, Stages())  # a second run replaces the first

"""Everything on the tiny model that the package holds, in under a minute: latencies, both routers, targets, sentences.

The model was trained and made elastic beforehand (see its card in `flextron/assets`), so its losses mean something, and
nothing here trains but routers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flextron.api import ElasticModel, evaluation_text, load
from flextron.api.packaged import TINY, tiny_model
from flextron.api.texts import sequences
from flextron.errors import FlextronError
from flextron.files import write_json
from flextron.routing.compare import uniform_within
from flextron.routing.token_calibration import score_routed
from flextron.scoring.mean_loss import mean_loss
from flextron.training.router_recipe import RouterRecipe
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.workflows.demo import RECORD, own_record
from flextron.workflows.elastify import Progress
from flextron.workflows.figure import can_draw, draw_kinds

__all__ = ["TinySettings", "run_tiny", "tiny_model"]

_PROMPT = "The city was"
_ASKED = {"model": TINY}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySettings:
    """How long the tiny demo takes."""

    output: Path = Path("out/demo-tiny")
    targets: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6)
    router: RouterRecipe = field(default_factory=lambda: RouterRecipe(num_measured=96))
    tokens: TokenRouterRecipe = field(
        default_factory=lambda: TokenRouterRecipe(warm_tokens=4096, warm_epochs=4, num_draws=2, joint_steps=0)
    )
    num_tokens: int = 4096
    context: int = 128


def run_tiny(settings: TinySettings, progress: Progress) -> list[dict[str, Any]]:
    """Load, measure, route, compare; the model with what was measured is left in the output directory.

    Returns:
        Rows for a table: at each target the loss of uniform widths, of the static router's choice, and of routed
        tokens, all within the target's cost on this device.
    """
    if not can_draw():
        raise FlextronError("the demo needs matplotlib; pip install matplotlib")
    # the record comes first, so that an interrupted demo's directory is still known as one
    own_record(settings.output, _ASKED)
    write_json(settings.output / RECORD, {"asked": _ASKED})
    model = load(tiny_model())
    topics = evaluation_text()
    with progress("measuring latencies") as measure:
        table = model.measure_latencies(on_progress=measure)
    reached = [t for t in settings.targets if t >= table.predict(model.space.smallest)]
    with progress("training the static router") as training, progress("measuring its choices") as comparing:
        model.route(
            topics[1::2],
            settings.router,
            num_tokens=settings.num_tokens // 2,
            context=settings.context,
            on_round=training,
            on_compare=comparing,
        )
    with progress("training the token router") as training:
        model.route_tokens(
            topics[::4],
            settings.tokens,
            targets=[t for t in reached if t < 1],
            context=settings.context,
            on_step=training,
        )
    test_BT = sequences(topics[2::4], model.tokenizer, num_tokens=settings.num_tokens, context=settings.context)
    rows = [_row(model, target, test_BT) for target in reached]
    model.save(settings.output / "elastic", overwrite=True)
    facts = {"asked": _ASKED, "rows": rows, "prompt": _PROMPT, "text": "pydoc topics"}
    write_json(settings.output / RECORD, facts)
    assert model.frontier is not None
    draw_kinds(model.frontier.points, settings.output / "frontier.png", title=f"the tiny model on {table.device}")
    return rows


def _row(model: ElasticModel, target: float, test_BT: torch.Tensor) -> dict[str, Any]:
    """What a target buys."""
    assert model.router is not None
    table = model.measure_latencies()
    spec = model.router.spec(target, table)
    uniform = [mean_loss(model.decoder, test_BT, s) for s in uniform_within(model.space, table, target)]
    row: dict[str, Any] = {
        "target": target,
        "parameters": model.num_parameters(spec),
        "latency_ms": table.predict_ms(spec),
        "uniform": math.exp(min(uniform)) if uniform else None,
        "static_router": math.exp(mean_loss(model.decoder, test_BT, spec)),
        "token_router": None,
        "text": model.generate(_PROMPT, spec=spec, max_tokens=24),
    }
    if target < 1:
        assert model.token_router is not None
        score = score_routed(
            model.decoder, test_BT, model.token_router.static_spec(target), model.token_router.at(target), table
        )
        row["token_router"] = math.exp(score.loss)
    return row

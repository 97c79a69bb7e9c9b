"""What a user could take instead of a sub-network: quality over decode latency and over memory, in one run.

`python -m experiments.elastification.alternatives --data DIR --output DIR --tokens N` prunes SmolLM2 in three ways
(whole layers, equal widths, an elastic search), heals each with a low-rank adapter on the same N tokens of the same
text, one run for each size of the first two and a single run for all sizes of the elastic one, and adds the package's
adapter. Every network is measured in float32, int8 and int4, the full one too. Runs that are done are kept in the
output directory; a killed command goes on where it was. At the end it writes `results.json`, `results.md` and
`results.png`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flextron
from benchmarks.rounding import round_matrices, rounded_head
from experiments.elastification.curve import choose, texts, wikitext
from experiments.elastification.decoding import decode_ms
from experiments.elastification.pictures import draw_alternatives, table_of
from flextron import TrainRecipe
from flextron.api.packaged import boxed_adapter
from flextron.api.texts import needed, sequences
from flextron.files import read_json, write_json
from flextron.kernels.layout import WEIGHTS, Weights
from flextron.model.batch import Batch
from flextron.model.cost import layer_parameters, num_parameters
from flextron.model.decoder import Decoder
from flextron.spec import LayerSpec, SubnetSpec
from flextron.workflows.demo import default_model

__all__ = ["SIZES", "block_influence", "main", "without_layers"]

SIZES = (0.9, 0.75, 0.6, 0.5)
"""Weights of the pruned networks, embeddings included, over the full network's."""
_CONTEXT = 256
_SKIPPED = LayerSpec(intermediate_size=0, num_groups=0)


def recipe(tokens: int) -> TrainRecipe:
    """How every network is healed."""
    return TrainRecipe(
        tokens=tokens,
        context=_CONTEXT,
        batch_size=8,
        micro_batch_size=8,
        subnets_per_batch=4,
        lora_rank=56,
        lr=1e-3,
        lm_weight=0.5,
        weight_decay=0.0,
        min_size=0.24,
        full_probability=0.25,
        anneal_fraction=0.0,
        precision="bf16",
        checkpoint_minutes=3.0,
    )


@torch.no_grad()
def block_influence(decoder: Decoder, tokens_BT: Tensor) -> list[float]:
    """How much each layer turns its tokens: 1 - the cosine of what comes in and goes out (ShortGPT's score)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((inputs[0], output))

    handles = [layer.register_forward_hook(hook) for layer in decoder.layers]
    decoder(Batch.padded(tokens_BT, decoder.config.full_spec))
    for handle in handles:
        handle.remove()
    return [1 - float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in seen]


def without_layers(decoder: Decoder, influence: Sequence[float], size: float) -> SubnetSpec:
    """The full network without the layers of least influence, as many as it takes to be within a size."""
    config, spec = decoder.config, decoder.config.full_spec
    layers = list(spec.layers)
    for i in sorted(range(len(layers)), key=influence.__getitem__):
        if num_parameters(config, SubnetSpec(layers=tuple(layers))) <= size * num_parameters(config, spec):
            break
        layers[i] = _SKIPPED
    return SubnetSpec(layers=tuple(layers))


def of_equal_widths(decoder: Decoder, size: float) -> SubnetSpec:
    """Equal layers within a size, MLP and attention narrowed about alike.

    They fill the size, where training's `uniform_subnet` keeps to nearest fractions and may leave a tenth of it unused:
    what is compared with must not be weaker than it has to be.
    """
    config, full = decoder.config, decoder.config.full_spec
    total, count = num_parameters(config, full), config.num_hidden_layers
    limit = (size * total - (total - count * layer_parameters(config, full.layers[0]))) / count
    fitting = [
        LayerSpec(intermediate_size=width, num_groups=groups)
        for groups in range(1, config.num_groups + 1)
        for width in range(64, config.intermediate_size + 1, 64)
        if layer_parameters(config, LayerSpec(intermediate_size=width, num_groups=groups)) <= limit
    ]

    def imbalance(layer: LayerSpec) -> float:
        return abs(layer.num_groups / config.num_groups - layer.intermediate_size / config.intermediate_size)

    largest = max(layer_parameters(config, layer) for layer in fitting)
    near = [layer for layer in fitting if layer_parameters(config, layer) >= 0.97 * largest]
    return SubnetSpec(layers=(min(near, key=imbalance),) * count)


def rounded(decoder: Decoder, weights: Weights) -> Decoder:
    """The decoder with the numbers that the compiled iteration reads."""
    if weights == "float32":
        return decoder
    out = deepcopy(decoder)
    head = rounded_head(decoder)
    out.config = replace(out.config, tie_word_embeddings=False)
    out.head = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
    out.head.weight = nn.Parameter(head, requires_grad=False)
    round_matrices(out, weights)
    return out


class Experiment:
    """The runs in an output directory."""

    def __init__(self, data: Path, text: Path, output: Path, adapter: Path, tokens: int, num_eval: int) -> None:
        """Take what to train on, where to keep it, and how much of it."""
        self.text, self.output, self.tokens = text, output, tokens
        self.boxed = adapter
        base = self.base()
        tokenizer = needed(base.tokenizer)
        validation = [wikitext(data, "wt2.valid.tokens.txt.zst")]
        self.search_BT = sequences(validation, tokenizer, num_tokens=10 * _CONTEXT, context=_CONTEXT)
        self.held_out = texts(data, tokenizer, num_eval)
        self.rows: list[dict[str, Any]] = []
        self.pruned = self._pruned(base)

    def base(self) -> flextron.ElasticModel:
        """The model in the order of its widths' importance, without an adapter."""
        model = flextron.load(default_model(), elastic=self.boxed)
        assert model.adapter is not None
        model.adapter.add_to(model.decoder, -1)
        model.adapter = None
        model.info = replace(model.info, recipe={})
        return model

    def _pruned(self, base: flextron.ElasticModel) -> dict[str, dict[float, SubnetSpec]]:
        influence = block_influence(base.decoder, self.search_BT[:4])
        return {
            "dropped layers": {size: without_layers(base.decoder, influence, size) for size in SIZES},
            "equal widths": {size: of_equal_widths(base.decoder, size) for size in SIZES},
        }

    def healed(self, name: str, specs: Sequence[SubnetSpec]) -> flextron.ElasticModel:
        """A model whose adapter was trained for some sub-networks, or by the recipe if there are none."""
        directory = self.output / f"{name}.adapter"
        if directory.exists():
            return flextron.load(default_model(), elastic=directory)
        model = self.base()
        how = recipe(self.tokens)
        if specs:
            how = how.model_copy(update={"subnets_per_batch": 1})
        model.train(self.text, how, specs=specs, run_directory=self.output / f"{name}.run")
        model.save_adapter(directory, overwrite=True)
        return model

    def measure(self, name: str, model: flextron.ElasticModel, specs: Mapping[float, SubnetSpec], tokens: int) -> None:
        """Add the losses of some sub-networks in all precisions."""
        for weights in WEIGHTS:
            decoder = rounded(model.decoder, weights)
            for size, spec in specs.items():
                losses = {text: held_out.loss(decoder, spec) for text, held_out in self.held_out.items()}
                row = {"name": name, "size": size, "weights": weights, "tokens": tokens, "losses": losses}
                self.rows.append(row | {"spec": spec, "params": num_parameters(model.decoder.config, spec)})
                print(json.dumps({k: v for k, v in row.items() if k != "spec"}), flush=True)  # noqa: T201

    def run(self) -> list[dict[str, Any]]:
        """All runs and measurements; rows without latencies where the compiled iteration does not run."""
        base = self.base()
        self.measure("full network", base, {1.0: base.space.full}, 0)
        for name, specs in self.pruned.items():
            for size, spec in specs.items():
                model = self.healed(f"{name.replace(' ', '-')}-{size:g}", [spec])
                self.measure(name, model, {size: spec}, self.tokens)
        for name, model in {
            "elastic": self.healed("elastic", []),
            "elastic, in the package": flextron.load(default_model(), elastic=self.boxed),
        }.items():
            specs = choose(model.decoder, model.space, self.search_BT, SIZES)
            self.measure(name, model, specs, model.info.recipe["num_tokens"])
        specs = [row.pop("spec") for row in self.rows]
        times = decode_ms(base.decoder, [(s, row["weights"]) for s, row in zip(specs, self.rows, strict=True)])
        return [
            row | {"ms": ms, "mem_mb": _bits(row["weights"]) / 8 * row["params"] / 1e6, "spec": spec.to_dict()}
            for row, ms, spec in zip(self.rows, times, specs, strict=True)
        ]


def _bits(weights: str) -> float:
    """Bits of a weight with its share of the scales."""
    return {"float32": 32.0, "int8": 8.0, "int4": 5.2}[weights]


def main() -> None:
    """Do what is not done yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the held-out texts")
    parser.add_argument("--text", type=Path, required=True, help="training text, as `mix` writes it")
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs and the results")
    parser.add_argument("--tokens", type=int, default=200_000, help="for healing each network")
    parser.add_argument(
        "--adapter", type=Path, default=boxed_adapter(), help="elastic adapter; the package's by default"
    )
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each held-out text")
    args = parser.parse_args()
    results = args.output / "results.json"
    if not results.exists():
        experiment = Experiment(args.data, args.text, args.output, args.adapter, args.tokens, args.eval_tokens)
        rows = experiment.run()
        write_json(results, {"machine": platform.processor() or platform.machine(), "rows": rows})
    rows = read_json(results)["rows"]
    (args.output / "results.md").write_text(table_of(rows), encoding="utf-8")
    draw_alternatives(rows, args.output / "results.png")


if __name__ == "__main__":
    main()

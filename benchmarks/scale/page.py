"""`python -m benchmarks.scale.page`: prints the tables of docs/scaling.md and puts them there.

A table stands between a line `<!-- scaling: NAME -->` and a line `<!-- /scaling -->`. Costs are counted by
`benchmarks.scale.cost`; what was measured comes from `benchmarks/results/scale.json`. With `--check` nothing is
written, and the exit code is 1 if a table is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.scale.cost import Gpu, held, moved, step_operations
from flextron.families.config import config_from_hf
from flextron.model.config import DecoderConfig
from flextron.model.cost import num_parameters
from flextron.training.recipe import TrainRecipe

__all__ = ["TABLES", "fill", "main"]

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
_BLOCK = re.compile(r"^(<!-- scaling: ([a-z-]+) -->\n)(.*?)^(<!-- /scaling -->)$", re.MULTILINE | re.DOTALL)

GPU = Gpu(
    name="H100 SXM, 80 GB",
    memory=80e9,
    operations=989e12,
    utilisation=0.4,
    near=450e9,
    far=50e9,
    per_machine=8,
)
_MEAN_SIZE = 0.76
"""Of the drawn sub-networks by default: one in five is full, the others are 0.7 of the layers on average."""
_FRACTION = 0.0763


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A model on some GPUs."""

    name: str
    config: DecoderConfig
    num_gpus: int
    pretraining_tokens: float
    recipe: TrainRecipe

    @property
    def operations(self) -> float:
        """Operations of a step, over all GPUs."""
        return step_operations(self.config, self.recipe, _MEAN_SIZE)

    @property
    def compute_seconds(self) -> float:
        """Seconds of a step's products."""
        return self.operations / (self.num_gpus * GPU.operations * GPU.utilisation)

    @property
    def link_seconds(self) -> float:
        """Seconds in which a GPU receives what a step moves."""
        rate = GPU.near if self.num_gpus <= GPU.per_machine else GPU.far
        return moved(self.config, self.recipe, self.num_gpus).total / rate


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return config_from_hf(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
        }
    )  # fmt: skip


def scenarios(rank: int | None) -> list[Scenario]:
    """The models of the page; with a rank, low-rank updates beside the frozen base train."""
    rows = (
        ("1.1B (TinyLlama)", _shape(2048, 5632, 22, 32, 4), 1, 3e12, 64, 4),
        ("6.7B (Llama 2)", _shape(4096, 11008, 32, 32, 32), 8, 2e12, 256, 4),
        ("69B (Llama 2)", _shape(8192, 28672, 80, 64, 8), 64, 2e12, 128, 2),
    )
    return [
        Scenario(
            name=name,
            config=config,
            num_gpus=gpus,
            pretraining_tokens=tokens,
            recipe=TrainRecipe(
                context=4096,
                batch_size=batch,
                micro_batch_size=micro,
                precision="bf16",
                gradient_checkpointing=True,
                lora_rank=rank,
            ),
        )
        for name, config, gpus, tokens, batch, micro in rows
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}"


def assumptions() -> str:
    """What is assumed of GPUs and links."""
    rows = [
        ["GPU", GPU.name],
        ["bfloat16 products, by the maker", f"{GPU.operations / 1e12:.0f} TFLOP/s"],
        ["part of them that training reaches", f"{GPU.utilisation:.0%}"],
        ["link within a machine, each direction", f"{GPU.near / 1e9:.0f} GB/s a GPU"],
        ["link between machines, each direction", f"{GPU.far / 1e9:.0f} GB/s a GPU"],
        ["GPUs of a machine", str(GPU.per_machine)],
        ["mean size of the drawn sub-networks", f"{_MEAN_SIZE} of the layers"],
    ]
    return _table(["assumption", "value"], rows)


def memory(rank: int | None) -> str:
    """Bytes of each GPU."""
    rows = []
    for s in scenarios(rank):
        h = held(s.config, s.recipe, s.num_gpus)
        parts = [h.shards, h.gathered, h.accumulated, h.activations, h.total]
        fits = "yes" if h.total <= GPU.memory else "no"
        rows.append([s.name, str(s.num_gpus), *(_gigabytes(p) for p in parts), fits])
    header = ["model", "GPUs", "shards", "gathered", "whole gradients", "activations", "in all, GB", "fits 80 GB"]
    return _table(header, rows)


def step(rank: int | None) -> str:
    """Work and traffic of a step."""
    rows = []
    for s in scenarios(rank):
        m = moved(s.config, s.recipe, s.num_gpus)
        rows.append(
            [
                s.name,
                str(s.num_gpus),
                f"{s.recipe.batch_size * s.recipe.context:,}",
                f"{s.operations / 1e15:.1f}",
                _gigabytes(m.gathers),
                _gigabytes(m.reductions),
                f"{s.compute_seconds:.2f}",
                f"{s.link_seconds:.2f}",
            ]
        )
    header = ["model", "GPUs", "tokens", "PFLOP", "GB gathered", "GB reduced", "s of products", "s of links"]
    return _table(header, rows)


def price() -> str:
    """What 7.63 % of the pretraining tokens cost."""
    rows = []
    for whole, low in zip(scenarios(None), scenarios(64), strict=True):
        tokens = _FRACTION * whole.pretraining_tokens
        pretraining = 6 * num_parameters(whole.config, whole.config.full_spec) * whole.pretraining_tokens
        cells = [f"{pretraining:.1e}", f"{tokens / 1e9:.0f}"]
        for s in (whole, low):
            steps = tokens / (s.recipe.batch_size * s.recipe.context)
            seconds = steps * max(s.compute_seconds, s.link_seconds)
            cells += [f"{steps * s.operations:.1e}", f"{seconds * s.num_gpus / 3600:,.0f}", f"{seconds / 86400:.0f}"]
        rows.append([whole.name, str(whole.num_gpus), *cells])
    header = ["model", "GPUs", "FLOP of pretraining", "billion tokens"]
    header += ["FLOP, all weights", "GPU hours", "days", "FLOP, rank 64", "GPU hours", "days"]
    return _table(header, rows)


def measured() -> str:
    """What the scale suite measured."""
    path = RESULTS / "scale.json"
    if not path.exists():
        return "Nothing yet: run `make bench-scale`.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [f["name"], f"{f['value']:.3g} {f['unit']}", f"{f['op']} {f['bar']:g}", f["note"]] for f in result["figures"]
    ]
    where = f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores; {result['date']}.\n\n"
    return where + _table(["figure", "value", "bar", "note"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "assumptions": assumptions,
    "memory": lambda: memory(None),
    "memory-low-rank": lambda: memory(64),
    "step": lambda: step(None),
    "step-low-rank": lambda: step(64),
    "price": price,
    "measured": measured,
}


def fill(text: str) -> str:
    """The page with its tables as they are now."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[4]}", text)


def main(argv: Sequence[str], page: Path = PAGE) -> int:
    """Print all tables and write the page, or check it."""
    before = page.read_text(encoding="utf-8")
    after = fill(before)
    if "--check" in argv:
        return int(before != after)
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}")
    page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

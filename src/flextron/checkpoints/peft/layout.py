"""Where peft keeps the linears of an adapter.

Families that fuse q, k and v in one linear have one bypass for it in peft's layout and three here. Reading gives the
three the same A. Writing joins three equal As again, and stacks different ones, which multiplies the rank but not what
the adapter computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flextron.families.config import FAMILIES, TensorMap
from flextron.model.adapter import linear_shapes
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "Module", "modules_of"]

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Module:
    """One linear of the checkpoint, and the linears here that it holds."""

    name: str
    layer: int
    targets: tuple[str, ...]
    rows: TensorMap
    """How a tensor with a row for each output comes apart."""
    is_turned: bool
    """Whether peft is to be told that the weight is stored as (in, out)."""


def modules_of(config: DecoderConfig, widths: SubnetSpec) -> Iterator[Module]:
    """The linears of a checkpoint that holds these widths, its skipped layers left out and the others renumbered."""
    for number, i in enumerate(widths.kept_layers):
        present = linear_shapes(config, widths.layers[i])
        for m in FAMILIES[config.family].tensors:
            targets = tuple(name.split(".")[-2] for name in m.ours)
            if m.hf.endswith(".weight") and set(targets) <= set(present):
                rows = TensorMap(m.hf, m.ours, per_head=m.per_head)
                yield Module(m.hf.format(i=number).removesuffix(".weight"), i, targets, rows, m.transposed)

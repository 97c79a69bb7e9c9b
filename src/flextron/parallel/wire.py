"""What the first rank tells the others: numbers, JSON and tensors over a process group, never pickled objects.

The first rank speaks, the others listen; a message reaches all of them in one broadcast, or in two if it is long. What
differs from rank to rank (weights) is sent to each by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from flextron.model.adapter import Adapter
from flextron.model.bypass import Bypass, Dora, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig, Rope
from flextron.model.outer import EmbeddingUpdate, Outer
from flextron.spec import SubnetSpec

__all__ = [
    "adapter_form",
    "adapter_of",
    "config_form",
    "config_of",
    "hear",
    "numbers_of",
    "receive_tensors",
    "send_tensors",
    "spec_form",
    "spec_of",
    "tell",
    "text_of",
]

_SHORT = 2048
"""Numbers that the first broadcast of a message has room for: those of an iteration that decodes."""


def tell(kind: int, numbers: Tensor) -> None:
    """Say something to all other ranks.

    Args:
        kind: what it is.
        numbers: what is said, (any number,), int32.
    """
    head = torch.zeros(2 + _SHORT, dtype=torch.int32)
    head[0], head[1] = kind, len(numbers)
    is_short = len(numbers) <= _SHORT
    if is_short:
        head[2 : 2 + len(numbers)] = numbers
    dist.broadcast(head, 0)
    if not is_short:
        dist.broadcast(numbers.contiguous(), 0)


def hear() -> tuple[int, Tensor]:
    """The kind and the numbers of the next message; waits for it."""
    head = torch.empty(2 + _SHORT, dtype=torch.int32)
    dist.broadcast(head, 0)
    kind, count = head[:2].tolist()
    if count <= _SHORT:
        return kind, head[2 : 2 + count]
    numbers = torch.empty(count, dtype=torch.int32)
    dist.broadcast(numbers, 0)
    return kind, numbers


def numbers_of(said: Any) -> Tensor:
    """What JSON can say, as numbers."""
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8).int()


def text_of(numbers: Tensor) -> Any:
    """The inverse of `numbers_of`."""
    return json.loads(numbers.to(torch.uint8).numpy().tobytes())


def send_tensors(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], rank: int) -> None:
    """Send tensors by name to one rank."""
    held = dict(tensors)
    form = numbers_of([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in held.items()])
    dist.send(torch.tensor([len(form)]), rank)
    dist.send(form, rank)
    for tensor in held.values():
        if tensor.numel():
            dist.send(tensor.detach().cpu().contiguous(), rank)


def receive_tensors() -> dict[str, Tensor]:
    """What the first rank sends by `send_tensors`."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, 0)
    form = torch.empty(int(size), dtype=torch.int32)
    dist.recv(form, 0)
    tensors = {}
    for name, dtype, shape in text_of(form):
        tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensors[name].numel():
            dist.recv(tensors[name], 0)
    return tensors


def config_form(config: DecoderConfig) -> dict[str, Any]:
    """A config as JSON can say it; where its weights come from is left out."""
    return asdict(replace(config, origin=None))


def config_of(form: Mapping[str, Any]) -> DecoderConfig:
    """The inverse of `config_form`."""

    def rope(found: dict[str, Any] | None) -> Rope | None:
        return None if found is None else Rope(**found)

    ropes, windows = form["layer_ropes"], form["layer_windows"]
    return DecoderConfig(
        **{
            **form,
            "rope": rope(form["rope"]),
            "layer_ropes": None if ropes is None else tuple(rope(found) for found in ropes),
            "layer_windows": None if windows is None else tuple(windows),
        }
    )


def spec_form(spec: SubnetSpec) -> list[list[int]]:
    """A sub-network as JSON can say it."""
    return [list(spec.intermediate_sizes), list(spec.num_groups)]


def spec_of(form: list[list[int]]) -> SubnetSpec:
    """The inverse of `spec_form`."""
    return SubnetSpec.of(*form)


def _bypass_form(bypass: Bypass) -> dict[str, Any]:
    if isinstance(bypass, Lora):
        return {"kind": "lora", "scale": bypass.scale}
    if isinstance(bypass, Ia3):
        return {"kind": "ia3", "on_input": bypass.on_input}
    assert isinstance(bypass, Dora), "others are never cut"
    return {"kind": "dora", "scale": bypass.lora.scale}


def _bypass_of(form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bypass:
    """A bypass without its parameters' values, in the shapes of these."""
    if form["kind"] == "ia3":
        return Ia3(Shape(len(tensors["factors"]), len(tensors["factors"])), on_input=form["on_input"])
    prefix = "lora." if form["kind"] == "dora" else ""
    a, b = tensors[f"{prefix}a"], tensors[f"{prefix}b"]
    lora = Lora(Shape(len(a), len(b)), a.shape[1], form["scale"])
    if form["kind"] == "lora":
        return lora
    out = Dora(lora, tensors["factors"])
    out.shift = None if "shift" not in tensors else torch.nn.Parameter(tensors["shift"])
    return out


def adapter_form(adapter: Adapter) -> dict[str, Any]:
    """What an adapter is, but for its parameters, as JSON can say it. The head's part is the first rank's alone."""
    layers = [{t: _bypass_form(b) for t, b in adapter.at(i).items()} for i in range(len(adapter.layers))]
    update = None if adapter.outer is None else adapter.outer.update
    return {
        "widths": spec_form(adapter.widths),
        "layers": layers,
        "has_outer": adapter.outer is not None,
        "update_scale": None if update is None else update.scale,
    }


def adapter_of(form: Mapping[str, Any], config: DecoderConfig, tensors: Mapping[str, Tensor]) -> Adapter:
    """The inverse of `adapter_form`, with the parameters' values; the head's part is left out."""

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def make(layer: int, target: str, _: Shape) -> Bypass | None:
        found = form["layers"][layer].get(target)
        if found is None:
            return None
        own = of(f"layers.{layer}.{target}.")
        bypass = _bypass_of(found, own)
        bypass.load_state_dict(own, assign=True)
        return bypass

    outer = None
    if form["has_outer"]:
        update, own = None, of("outer.update.")
        if form["update_scale"] is not None:
            update = EmbeddingUpdate(own["a"], own["b"], form["update_scale"], own.get("factors"))
        outer = Outer(embedding_VD=tensors.get("outer.embedding"), update=update)
    return Adapter(config, spec_of(form["widths"]), make, outer).requires_grad_(False).eval()

"""A machine from what `flextron profile` measured of an elastic checkpoint; its weights are not read.

A decode step and a prefill give two points of each sub-network's line over the tokens of an iteration. What a unit of
finetuning takes is not in a profile. It is derived from the same line: a layer forward costs its share, backward twice
that, since of frozen weights only the gradients of inputs are computed, and part of the layer is computed again.
`simulation/measure.py` measures both instead.
"""

from __future__ import annotations

from pathlib import Path

from flextron.elastic.checkpoint import read_elastic
from flextron.errors import FlextronError
from flextron.families.config import config_from_hf
from flextron.files import read_json
from flextron.model.config import DecoderConfig
from flextron.model.cost import block_parameters
from flextron.routing import Frontier, FrontierPoint, LatencyTable
from flextron.simulation.machine import Machine, NetworkTimes, TrainingTimes, UnitTime

__all__ = ["machine_of"]

_LEAST_KV_SHARE = 1e-3
_BACKWARD = 2.0
"""A layer backward, in layers forward."""
_HEAD = 2.0
"""The head both ways, in products with its weights."""


def machine_of(source: str | Path, kv_cache_gb: float | None = None) -> Machine:
    """The numbers of a machine's file, or of a profiled elastic checkpoint.

    Args:
        source: the file or the directory.
        kv_cache_gb: memory of a checkpoint's keys and values, 10^9 bytes, by default 1; a file says itself how many
            tokens there is room for.

    Raises:
        FlextronError: it is neither, or lacks what must be known.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _profiled(path, 1.0 if kv_cache_gb is None else kv_cache_gb)
    if kv_cache_gb is not None:
        raise FlextronError(f"{path} says itself how large its cache is; change kv_cache_tokens there")
    return Machine.read(path)


def _profiled(path: Path, kv_cache_gb: float) -> Machine:
    if not 0 < kv_cache_gb <= 1e6:
        raise FlextronError(f"kv_cache_gb is in gigabytes, above 0 and at most 1e6, not {kv_cache_gb:g}")
    info = read_elastic(path)
    if not (path / "frontier.json").exists():
        raise FlextronError(f"{path} has no measured frontier; run flextron profile {path} --prompts first")
    frontier = Frontier.from_dict(read_json(path / "frontier.json"))
    decode, prefill = (_table(path, frontier.device, phase) for phase in ("decode", "prefill"))
    if prefill is None or decode is None:
        raise FlextronError(
            f"{path} has no times of prompts on {frontier.device}; run flextron profile {path} --prompts there"
        )
    for table in (decode, prefill):
        table.check(info.space)
    full = frontier.full
    points = [full, *(p for p in frontier.best() if p.latency < 1)]
    config = config_from_hf(read_json(path / "config.json"))
    networks = tuple(
        NetworkTimes(
            latency=1.0 if p is full else p.latency,
            loss=p.loss,
            kv_share=max(_LEAST_KV_SHARE, p.kv_bytes_per_token / full.kv_bytes_per_token),
            points=_line(decode, prefill, p),
        )
        for p in points
    )
    return Machine(
        name=path.name,
        source=f"profile on {frontier.device}",
        networks=networks,
        kv_cache_tokens=int(kv_cache_gb * 1e9) // full.kv_bytes_per_token,
        context=config.max_position_embeddings,
        training=_training(config, decode, networks[0]),
    )


def _table(path: Path, device: str, phase: str) -> LatencyTable | None:
    found = (LatencyTable.from_dict(read_json(file)) for file in sorted((path / "latency").glob("*.json")))
    return next((table for table in found if table.device == device and table.phase == phase), None)


def _line(decode: LatencyTable, prefill: LatencyTable, point: FrontierPoint) -> tuple[tuple[int, float], ...]:
    few, many = decode.batch_size, prefill.batch_size * prefill.context
    low = decode.predict_ms(point.spec)
    # a machine that was busy during one of the two may have taken longer for less
    return (few, low), (many, max(low, prefill.predict_ms(point.spec)))


def _training(config: DecoderConfig, decode: LatencyTable, full: NetworkTimes) -> TrainingTimes:
    (few, low), (many, high) = full.points
    layers = config.num_hidden_layers
    a_token, fixed = (high - low) / (many - few) / layers, max(0.0, low - decode.base_ms) / layers
    head = config.hidden_size * config.vocab_size / block_parameters(config, config.full_spec) * layers
    return TrainingTimes(
        num_layers=layers,
        forward=UnitTime(fixed, a_token),
        head=UnitTime(decode.base_ms, _HEAD * head * a_token),
        backward=UnitTime(_BACKWARD * fixed, _BACKWARD * a_token),
        update=UnitTime(decode.base_ms, 0.0),
    )

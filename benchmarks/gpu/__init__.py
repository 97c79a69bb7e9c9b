"""The GPU suite: decoding, prompts, throughput, elastic training and finetuning beside serving, on one CUDA device.

Speed needs no trained weights, so models are drawn at random on the device and nothing is fetched or carried. All peers
are transformers (with peft where something trains) in the same run and type of numbers. `--rehearse` runs every row
with a tiny model on the CPU: what it measures means nothing, but everything has run once.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import decode, serving, training
from benchmarks.gpu.models import Setting, use
from benchmarks.harness import RESULTS, Figure, LeftOutError, described, run_suite

__all__ = ["run"]

_MEASURES = [
    serving.exact_tokens,
    decode.bandwidth,
    *decode.decode_speeds(),
    *decode.subnetwork_times(),
    *serving.prefill_speeds(),
    serving.throughput,
    training.elastic_adapter,
    training.beside_serving,
]


def run(*, rehearse: bool = False) -> bool:
    """Measure all; whether every figure holds.

    Raises:
        SystemExit: with code 2, where there is no CUDA device and this is no rehearsal.
    """
    if rehearse:
        use(Setting.rehearsal())
        directory = Path(tempfile.mkdtemp(prefix="flextron-rehearsal-"))
        run_suite("gpu", _MEASURES, directory)
        print(f"rehearsal on the CPU, whose figures mean nothing: {directory / 'gpu.json'}")
        return True
    if not torch.cuda.is_available():
        print("the gpu suite needs a CUDA device; --rehearse runs it with a tiny model on the CPU", file=sys.stderr)
        raise SystemExit(2)
    use(Setting.gpu())
    failed: list[str] = []
    return run_suite("gpu", [_kept_apart(measure, failed) for measure in _MEASURES], RESULTS) and not failed


def _kept_apart(measure: Callable[[], Figure], failed: list[str]) -> Callable[[], Figure]:
    """A row whose failure is told, and does not keep the others from running: a GPU may be at hand but once."""

    def run_it() -> Figure:
        try:
            return measure()
        except Exception as error:
            traceback.print_exc()
            failed.append(described(measure))
            raise LeftOutError(f"failed: {type(error).__name__}: {str(error)[:300]}") from error

    run_it.__doc__ = described(measure)
    return run_it

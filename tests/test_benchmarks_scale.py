"""The costs of docs/scaling.md against PyTorch's counters on a small model, and the page against the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale.cost import held, layer_activations, moved, step_operations
from benchmarks.scale.page import PAGE, main
from benchmarks.scale.worker import medium_run
from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.rope import rotary_tables
from tests.ranks import Collectives, Ranks


def test_the_page_shows_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, "run python -m benchmarks.scale.page"
    page = tmp_path / "scaling.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("| 989 TFLOP/s |", "| 900 TFLOP/s |"), encoding="utf-8")
    assert main(["--check"], page) == 1
    assert main([], page) == 0
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert "989 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [None, 8])
def test_operations_are_those_that_a_step_does(rank: int | None) -> None:
    # a short context: PyTorch counts whole squares of attention, and the page half of them
    run = medium_run(rank, context=16, batch_size=4, micro_batch_size=4, tokens=640, kl_fraction=0.5)
    with FlopCounterMode(display=False) as counter:
        run.step(0)
    assert counter.get_total_flops() == pytest.approx(step_operations(run.decoder.config, run.recipe), rel=0.02)


def test_activations_are_those_that_a_layer_keeps() -> None:
    run = medium_run(None, context=64, batch_size=4, tokens=640, precision="bf16")
    decoder: Decoder = run.decoder
    batch = Batch.padded(run.blocks.batch(0, 4), decoder.widths)
    ropes = rotary_tables(decoder.config, batch.positions_N, torch.float32)
    x = decoder.embed(batch).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_token = len(batch.tokens_N) in tensor.shape or tensor.shape[-2:-1] == (64,)
        if is_token and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    core = CausalAttention(decoder.config)
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        decoder.layers[0](x, batch, 0, ropes[0], core)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found == pytest.approx(layer_activations(decoder.config, len(batch.tokens_N)), rel=0.35)


def traffic(_: torch.device, rank: int | None) -> tuple[float, float, float]:
    """Bytes that a process receives by gathering and by reducing in a step of two micro batches, and what it holds."""
    run = medium_run(rank, context=16, batch_size=8, micro_batch_size=2, tokens=640)
    with Collectives() as counter:
        run.step(0)
    # each call counts what it gives in and what it gets, 1/W and all of the whole
    received = [
        sum(b for name, b in counter.calls if name == op) / 3 for op in ("_allgather_base_", "_reduce_scatter_base_")
    ]
    tensors = [*run.module.parameters(), *(t for s in run.optimizer.state.values() for t in s.values())]
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return received[0], received[1], sum(t.untyped_storage().nbytes() for t in {id(t): t for t in local}.values())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 8])
def test_bytes_are_those_that_processes_receive(rank: int | None, tmp_path: Path) -> None:
    ranks = Ranks("gloo", 2, tmp_path)
    try:
        found = ranks.run(traffic, rank)
    finally:
        ranks.close()
    run = medium_run(rank, context=16, batch_size=8, micro_batch_size=2, tokens=640)
    expected = moved(run.decoder.config, run.recipe, 2)
    for gathers, reductions, _ in found:
        assert gathers == pytest.approx(expected.gathers, rel=0.01)
        assert reductions == pytest.approx(expected.reductions, rel=0.01)
    if rank is None:
        trained = sum(p.numel() for p in run.trained.values())
        shards = held(run.decoder.config, run.recipe, 2).shards - 4 * trained / 2  # the gradients are gone
        assert found[0][2] == pytest.approx(shards, rel=0.01)

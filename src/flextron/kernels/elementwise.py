"""The compiled kernels of `csrc/elementwise.h`, for float32 and bfloat16 on a CPU, with gradients.

PyTorch takes a norm, the gate of an MLP and the losses over the vocabulary apart into operators, each of which goes
over memory once; in training they take half of the time. Here each goes over it once or twice. The arithmetic is in
float32. Where there is no kernel for a tensor, the functions do the same with PyTorch's operators.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron.kernels.build import library_of, load_library
from flextron.losses.vocabulary import ChunkLosses, chunk_losses
from flextron.model.decoder import Decoder
from flextron.model.layers import MLP
from flextron.model.norms import RMSNorm, rms_norm

__all__ = ["chunk_losses_compiled", "rms_norm_compiled", "silu_gate", "takes", "use_kernels"]

_Pointer, _Number, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def use_kernels(decoder: Decoder) -> None:
    """Let the norms and gates of a decoder run by these kernels."""
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.normalise = rms_norm_compiled
        elif isinstance(module, MLP) and module.activation is F.silu:
            module.gated = silu_gate


def takes(x: Tensor) -> bool:
    """Whether there are kernels for tensors like this one."""
    is_known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    return is_known and not isinstance(load_library("training"), str)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise."""
    if not takes(gate) or up.dtype != gate.dtype:
        return F.silu(gate) * up
    return _SiluGate.apply(gate, up)  # type: ignore[no-untyped-call,no-any-return]


def rms_norm_compiled(x: Tensor, gains: Tensor, eps: float) -> Tensor:
    """See `flextron.model.layers.rms_norm`."""
    if not takes(x):
        return rms_norm(x, gains, eps)
    return _RmsNorm.apply(x, gains.float(), eps)  # type: ignore[no-untyped-call,no-any-return]


def chunk_losses_compiled(
    logits_NV: Tensor,
    teacher_NV: Tensor | None,
    targets_N: Tensor | None,
    *,
    scales: tuple[float, float | Tensor],
    temperature: float,
    cap: float | None,
) -> ChunkLosses:
    """See `flextron.losses.vocabulary.chunk_losses`; the gradient takes the place of the logits."""
    same = teacher_NV is None or teacher_NV.dtype == logits_NV.dtype
    if not takes(logits_NV) or not same or temperature != 1 or cap is not None:
        return chunk_losses(logits_NV, teacher_NV, targets_N, scales=scales, temperature=temperature, cap=cap)
    logits_NV = logits_NV.contiguous()
    teacher_NV = None if teacher_NV is None else teacher_NV.contiguous()
    targets_N = None if targets_N is None else targets_N.contiguous()
    sums = torch.empty(2, len(logits_NV), dtype=torch.float64)
    library_of("training").flextron_distances(
        ctypes.c_bool(logits_NV.dtype == torch.float32),
        *_addresses(logits_NV, teacher_NV, targets_N),
        *(_Real(float(scale)) for scale in scales),
        *_addresses(sums[0], sums[1]),
        *map(_Number, (*logits_NV.shape, torch.get_num_threads())),
    )
    return ChunkLosses(kl=sums[0].sum(), lm=sums[1].sum(), gradient_NV=logits_NV)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _run("gate", gate, (up, out), (gate.numel(),))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _run("gate_back", gate, (up, grads[0].to(gate.dtype).contiguous(), d_gate, d_up), (gate.numel(),))
        return d_gate, d_up


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gains: Tensor, eps: float) -> Tensor:
        x, gains = x.contiguous(), gains.contiguous()
        size = x.shape[-1]
        y, inverse = torch.empty_like(x), torch.empty(x.numel() // size)
        ctx.save_for_backward(x, gains, inverse)
        library_of("training").flextron_norm(
            ctypes.c_bool(x.dtype == torch.float32),
            *_addresses(x, gains),
            _Real(eps),
            *_addresses(y, inverse),
            *map(_Number, (len(inverse), size, torch.get_num_threads())),
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gains, inverse = ctx.saved_tensors
        g, dx = grads[0].to(x.dtype).contiguous(), torch.empty_like(x)
        d_gains = torch.empty_like(gains) if ctx.needs_input_grad[1] else None
        _run("norm_back", x, (gains, inverse, g, dx, d_gains), (len(inverse), x.shape[-1]))
        return dx, d_gains, None


def _run(name: str, x: Tensor, others: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Call a kernel with the type of `x`, tensors, sizes and the number of threads."""
    function = getattr(library_of("training"), f"flextron_{name}")
    function(
        ctypes.c_bool(x.dtype == torch.float32),
        *_addresses(x, *others),
        *map(_Number, (*sizes, torch.get_num_threads())),
    )


def _addresses(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [_Pointer(None if t is None else t.data_ptr()) for t in tensors]

"""Products of tokens with eight-bit weights in whole numbers, by the compiled kernels of `csrc/int8.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from flextron.kernels.build import library_of
from flextron.kernels.quantization import PANEL_ROWS, pack_panels, quantize_rows

__all__ = ["Panels"]

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (_Pointer, _Number, _Number, _Pointer, _Pointer, _Number, _Pointer, _Number, _Pointer, _Number)


class Panels:
    """A matrix in eight bits with a scale for each output."""

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        """Pack numbers, (outputs, inputs) int8, with scales, (outputs,) float32."""
        self._panels = pack_panels(numbers)
        self._scales = pad(scales, (0, -len(scales) % PANEL_ROWS))
        self.shape = numbers.shape

    @staticmethod
    def of(weight: Tensor) -> Panels:
        """Round a weight, (outputs, inputs)."""
        return Panels(*quantize_rows(weight))

    def multiply(
        self, x_NK: Tensor, num_outputs: int | None = None, scales_N: Tensor | None = None, threads: int | None = None
    ) -> Tensor:
        """Round tokens and multiply them.

        Args:
            x_NK: tokens, float32; K is up to the number of inputs, of which the leading ones are used.
            num_outputs: of how many leading outputs; all by default.
            scales_N: what the tokens are to be multiples of; by default 127 times it reaches the largest number of a
                token, or four root mean squares where that is less. Larger multiples, up to 16,000, are kept as well.
            threads: as many as PyTorch has by default.

        Returns:
            (N, outputs) float32.
        """
        x_NK = x_NK.contiguous()
        (n, size), outputs = x_NK.shape, self.shape[0] if num_outputs is None else num_outputs
        assert size <= self.shape[1], "the matrix has fewer inputs"
        assert outputs <= self.shape[0], "the matrix has fewer outputs"
        out_NO = torch.empty(n, outputs)
        function = library_of("decoder").flextron_multiply_tokens
        function.argtypes = (
            _Pointer,
            _Number,
            _Number,
            _Pointer,
            _Pointer,
            _Number,
            _Pointer,
            _Number,
            _Pointer,
            _Number,
        )
        function(
            x_NK.data_ptr(),
            n,
            size,
            None if scales_N is None else scales_N.data_ptr(),
            self._panels.data_ptr(),
            self._panels.shape[1],
            self._scales.data_ptr(),
            outputs,
            out_NO.data_ptr(),
            threads or torch.get_num_threads(),
        )
        return out_NO

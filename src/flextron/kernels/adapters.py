"""An adapter as the compiled iteration of `csrc/decoder.cpp` reads it: pointers to its parameters, where they are."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.kernels.layout import BypassPointers
from flextron.model.adapter import TARGETS, Adapter
from flextron.model.bypass import Bypass, Dora, Ia3, Lora

__all__ = ["NativeAdapter", "why_adapter_not_native"]


def why_adapter_not_native(adapter: Adapter) -> str | None:
    """Why an adapter cannot run in the compiled iteration, in one sentence; None if it can.

    LoRA can beside all linears, DoRA beside those without a bias, IA3 where it has factors of outputs, or of the inputs
    of `o` and `down`.
    """
    if adapter.outer is not None:
        return "there are no kernels for what stands beside embeddings and head"
    for layer in adapter.adapted_layers:
        for target, bypass in adapter.at(layer).items():
            if isinstance(bypass, Dora) and bypass.shift is not None:
                return "there are no kernels for DoRA beside linears with biases"
            if not isinstance(bypass, Lora | Ia3 | Dora):
                return f"there are no kernels for {type(bypass).__name__}"
            if isinstance(bypass, Ia3) and bypass.on_input and target not in ("o", "down"):
                return f"there are no kernels for factors of the inputs of {target}"
    return None


class NativeAdapter:
    """Pointers to an adapter's parameters, which must stay as they are while this lives."""

    def __init__(self, adapter: Adapter) -> None:
        """Collect the pointers; parameters that are not float32 on the CPU are copied.

        Raises:
            FlextronError: `why_adapter_not_native` has a reason.
        """
        if (reason := why_adapter_not_native(adapter)) is not None:
            raise FlextronError(f"the adapter does not run compiled: {reason}")
        self.max_rank = 0
        """Largest rank of its LoRA bypasses; 0 if it has none."""
        self._tensors: list[Tensor] = []
        """Kept alive for the pointers."""
        self._bypasses = (BypassPointers * (len(adapter.layers) * len(TARGETS)))()
        for layer in adapter.adapted_layers:
            for target, bypass in adapter.at(layer).items():
                self._bypasses[layer * len(TARGETS) + TARGETS.index(target)] = self._native(target, bypass)

    @property
    def address(self) -> int:
        """Address of the bypasses, layer after layer; valid as long as this object lives."""
        return ctypes.addressof(self._bypasses)

    def _native(self, target: str, bypass: Bypass) -> BypassPointers:
        if isinstance(bypass, Lora):
            return BypassPointers(**self._low_rank(bypass, bypass.b))
        if isinstance(bypass, Dora):
            lora, lengths = bypass.lora, bypass.factors
            # out of a nested dimension the kernels put factors on the frozen product alone
            b: Tensor = lora.b * lengths[:, None] if target in ("o", "down") else lora.b
            return BypassPointers(**self._low_rank(lora, b), outputs=self._address(lengths))
        assert isinstance(bypass, Ia3)
        factors = self._address(bypass.factors)
        return BypassPointers(inputs=factors) if bypass.on_input else BypassPointers(outputs=factors)

    def _low_rank(self, lora: Lora, b: Tensor) -> dict[str, Any]:
        self.max_rank = max(self.max_rank, lora.rank)
        return {"a": self._address(lora.a), "b": self._address(b), "rank": lora.rank, "scale": lora.scale}

    def _address(self, parameter: Tensor) -> int:
        tensor = parameter.detach().to("cpu", torch.float32).contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()

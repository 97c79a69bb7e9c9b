"""Devices that compute while the host goes on."""

from __future__ import annotations

import torch

__all__ = ["wait_for"]


def wait_for(device: torch.device) -> None:
    """Wait until all that was asked of a device is done, so that a clock on the host tells how long it took."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()

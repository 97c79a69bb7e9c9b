"""The device at hand, and a name for it: latencies measured on one hold on no other."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

__all__ = ["default_device", "device_fingerprint"]


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def device_fingerprint(device: torch.device, dtype: torch.dtype) -> str:
    """A file-name-safe name of device, threads and precision."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {dtype}".lower().replace("torch.", "")).strip("-")

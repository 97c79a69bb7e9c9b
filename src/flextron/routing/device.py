"""The device at hand, and a name for it: latencies measured on one hold on no other."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Literal, get_args

import torch

from flextron.errors import FlextronError

__all__ = ["Precision", "checked_device", "checked_dtype", "default_device", "device_fingerprint"]

Precision = Literal["float32", "bfloat16", "float16"]
"""Types of weights, activations, keys and values."""


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked_device(device: torch.device | str | None) -> torch.device:
    """A device that is here; the default one for None.

    Raises:
        FlextronError: PyTorch does not know the name, or does not find the device.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise FlextronError(f"device must be cpu, cuda or cuda:N, not {device!r}") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise FlextronError(
            f"device {found} is not here: PyTorch {torch.__version__} finds {count} CUDA devices; leave "
            "the device out, or install a PyTorch and a driver for it"
        )
    return found


def checked_dtype(name: Precision) -> torch.dtype:
    """A type of numbers by its name.

    Raises:
        FlextronError: models do not run in it.
    """
    if name not in get_args(Precision):
        raise FlextronError(f"dtype must be one of {', '.join(get_args(Precision))}, not {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


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

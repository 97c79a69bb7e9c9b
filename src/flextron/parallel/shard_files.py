"""Tensors on disk as `torch.distributed.checkpoint` writes them: each process its shards, as safetensors, no pickle."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

__all__ = ["ShardFiles"]


class ShardFiles:
    """Tensors of a directory, which all processes of a run see; they make the same calls."""

    def __init__(self, directory: Path, *, alone: bool) -> None:
        """Name the directory; `alone` if there is but one process."""
        self._directory, self._alone = str(directory), alone

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors, which are the same on all processes, and shards."""
        with _plainly():
            writer = HuggingFaceStorageWriter(self._directory, save_distributed=True)
            save(dict(tensors), storage_writer=writer, no_dist=self._alone)

    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """What is there in full, by name; a tensor of which a part is missing is left out."""
        stored = HuggingFaceStorageReader(self._directory).read_metadata().state_dict_metadata
        return {
            name: (found.size, found.properties.dtype)
            for name, found in stored.items()
            if isinstance(found, TensorStorageMetadata)
            and sum(math.prod(chunk.sizes) for chunk in found.chunks) == math.prod(found.size)
        }

    def read(self, wanted: dict[str, Tensor]) -> None:
        """Fill whole tensors or shards, however the stored ones were cut."""
        with _plainly():
            load(wanted, storage_reader=HuggingFaceStorageReader(self._directory), no_dist=self._alone)


@contextmanager
def _plainly() -> Iterator[None]:
    """Let PyTorch's checkpoints raise what went wrong in the process where it did, and log nothing."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # that one process writes alone
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
    finally:
        logger.setLevel(before)

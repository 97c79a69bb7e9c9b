"""The files of a Hugging Face directory: which hold the weights, and that none of them lies anywhere else.

A checkpoint is data from elsewhere. An index may name any path, a file may be a link to another place, a pipe or a
device. All of that is refused before the first byte is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flextron.errors import FlextronError
from flextron.files import checked, read_json

__all__ = ["Shards", "check_files", "find_shards"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_READ = re.compile(r".*\.(json|safetensors|model|jinja)|vocab\.txt|merges\.txt")
"""Names of the files that this package and `transformers` open in a checkpoint's directory."""


_FileName = Annotated[str, Field(min_length=1, max_length=255)]


class _Index(BaseModel):
    """`model.safetensors.index.json`; its metadata says nothing that is needed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    weight_map: Annotated[
        dict[str, Annotated[str, Field(min_length=1, max_length=255)]], Field(min_length=1, max_length=10**6)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Weights of a checkpoint, in one file or several."""

    files: Mapping[Path, tuple[str, ...]]
    """Names of the tensors that are read from each file."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(name for names in self.files.values() for name in names)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor after the other.

        Raises:
            FlextronError: a file is corrupt.
        """
        for path, names in self.files.items():
            for name in names:
                # opened for each tensor: what was read of a mapped file stays in memory while it is open
                yield name, _tensor(path, name)


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise _corrupt(path, error) from error


def _names(path: Path) -> tuple[str, ...]:
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> FlextronError:
    return FlextronError(f"{path} is corrupt or truncated ({error}); download it again")


def check_files(directory: Path) -> None:
    """See that all files that will be opened are regular ones, and lie in the directory.

    Links within it are fine, and those of the hub's cache, whose snapshots link to blobs beside them.

    Raises:
        FlextronError: one is a pipe or a device, or leads elsewhere.
    """
    for entry in sorted(directory.iterdir()):
        if _READ.fullmatch(entry.name) and not entry.is_dir():
            _check_file(entry, directory)


def _check_file(path: Path, directory: Path) -> None:
    """One file; a link that leads nowhere is told as missing when it is read."""
    try:
        target = Path(os.path.realpath(path, strict=True))
        mode = target.stat().st_mode
    except OSError as error:
        raise FlextronError(f"{path} cannot be read ({error.strerror}); restore it") from error
    root = directory.resolve()
    homes = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(home) for home in homes):
        raise FlextronError(f"{path} is a link out of its directory; put the file itself there")
    if not stat.S_ISREG(mode):
        raise FlextronError(f"{path} is not a regular file; put the file itself there")


def find_shards(directory: Path) -> Shards:
    """The weights as `transformers` finds them: the single file, or else what the index lists.

    Raises:
        FlextronError: there are none, files are missing, corrupt or elsewhere, or the two disagree.
    """
    single, index = directory / _SINGLE, directory / _INDEX
    if not index.exists():
        if not single.exists():
            raise _missing(directory, [_SINGLE])
        return Shards(files={single: _names(single)})
    weight_map = _weight_map(index)
    named = sorted(set(weight_map.values()))
    missing = [name for name in named if not (directory / name).exists()]
    if single.exists():
        alone = Shards(files={single: _names(single)})
        if named != [_SINGLE] and not missing and not _agree(alone, _indexed(directory, named, weight_map)):
            raise FlextronError(
                f"{directory} holds {_SINGLE} and, by {_INDEX}, shards with other weights; remove what is outdated"
            )
        return alone
    if missing:
        raise _missing(directory, missing)
    return _indexed(directory, named, weight_map)


def _weight_map(index: Path) -> Mapping[str, str]:
    found = checked(_Index, read_json(index), str(index), "it names no usable shards (weight_map), download it again")
    for name in found.weight_map.values():
        if {name} != {PurePosixPath(name).name, PureWindowsPath(name).name} or name == ".." or "\0" in name:
            raise FlextronError(f"{index} names {name!r}, which is not a file of its directory; download it again")
        if not name.endswith(".safetensors"):
            raise FlextronError(f"{index} names {name!r}, which is no safetensors file; download the safetensors ones")
    return found.weight_map


def _indexed(directory: Path, named: list[str], weight_map: Mapping[str, str]) -> Shards:
    """Each tensor from the shard that the index gives it to; shards may hold outdated ones of others."""
    files = {}
    for shard in named:
        held = _names(directory / shard)
        lacks = sorted({name for name, of in weight_map.items() if of == shard} - set(held))
        if lacks:
            raise FlextronError(
                f"{directory / shard} lacks {lacks[0][:200]!r}, which the index names there; download both again"
            )
        files[directory / shard] = tuple(name for name in held if weight_map.get(name, shard) == shard)
    names = [name for held in files.values() for name in held]
    if len(names) > len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise FlextronError(f"two shards in {directory} hold {twice[:200]!r}, which the index gives to neither")
    return Shards(files=files)


def _agree(a: Shards, b: Shards) -> bool:
    """Whether two sets of files hold the same tensors."""
    if a.names != b.names:
        return False
    where = {name: path for path, names in b.files.items() for name in names}
    for name, tensor in a.stream():
        other = _tensor(where[name], name)
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            return False
        # their bytes, because NaN would differ from itself
        if not torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (tensor, other))):
            return False
    return True


def _missing(directory: Path, names: list[str]) -> FlextronError:
    pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
    remedy = "convert its pickled weights to safetensors first" if pickled else "download it again"
    return FlextronError(f"{directory} lacks {', '.join(names[:5])}; {remedy}")

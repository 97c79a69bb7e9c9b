"""Models for verbs that write beside them."""

from __future__ import annotations

from pathlib import Path

from flextron import api
from flextron.elastic.adapter_file import is_adapter
from flextron.errors import FlextronError

__all__ = ["merged"]


def merged(directory: Path) -> api.ElasticModel:
    """Load an elastic checkpoint; an elastic adapter has no room for what is measured of a device.

    Raises:
        FlextronError: it is an adapter, or no elastic checkpoint.
    """
    if is_adapter(directory):
        raise FlextronError(
            f"{directory} is an elastic adapter; merge it with its base first: flextron apply BASE {directory} OUTPUT"
        )
    return api.load(directory)

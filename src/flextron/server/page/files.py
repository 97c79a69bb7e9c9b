"""The page's files, from the package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

__all__ = ["PREFIX", "Asset", "assets"]

PREFIX = "/page/"
"""Where the files stand; only `index.html` stands at `/`."""
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    content: bytes
    media_type: str
    etag: str
    """A hash of the content in quotation marks, by which a browser asks whether it has changed."""


@lru_cache(maxsize=1)
def assets() -> dict[str, Asset]:
    """All files by their paths on the server."""
    found = {}
    for file in sorted((files(__package__) / "assets").iterdir(), key=lambda file: file.name):
        content, kind = file.read_bytes(), _KINDS[file.name.rpartition(".")[2]]
        path = "/" if file.name == "index.html" else PREFIX + file.name
        found[path] = Asset(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found

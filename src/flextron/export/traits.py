"""Traits of a decoder that formats with a fixed list of families do not express."""

from __future__ import annotations

from dataclasses import MISSING, fields

from flextron.model.config import DecoderConfig

__all__ = ["unusual_traits"]

_READ = frozenset({"origin", "sliding_window"})
"""Traits with a default that each format looks at itself, or that say nothing of the function."""


def unusual_traits(config: DecoderConfig) -> tuple[str, ...]:
    """Names of the traits that a plain decoder has not, and this one has.

    A field of `DecoderConfig` with a default is a trait that most families lack. Formats that were written without it
    refuse a model that has it, so that a trait added later is refused rather than passed over.
    """
    return tuple(
        field.name
        for field in fields(config)
        if field.default is not MISSING and field.name not in _READ and getattr(config, field.name) != field.default
    )

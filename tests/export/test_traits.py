"""A trait that formats do not know is refused, whatever it is called."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from flextron.errors import FlextronError
from flextron.export import FORMATS, holds
from flextron.export.traits import unusual_traits
from flextron.model.config import DecoderConfig
from tests.checkpoints.families_cases import CASES
from tests.export.sources import random_source


@dataclass(frozen=True, kw_only=True)
class LaterConfig(DecoderConfig):
    """A config with a trait of a family to come."""

    novelty: float = 1.0


def later(case: str, **traits: float) -> LaterConfig:
    config = random_source(CASES[case]).decoder.config
    return LaterConfig(**{f.name: getattr(config, f.name) for f in fields(config)}, **traits)


@pytest.mark.parametrize("case", CASES)
def test_the_families_of_today_have_none(case: str) -> None:
    assert unusual_traits(random_source(CASES[case]).decoder.config) == ()
    assert unusual_traits(later(case)) == ()


@pytest.mark.parametrize("name", ["gguf", "nemotron-nas"])
def test_a_trait_that_comes_later_is_refused(name: str) -> None:
    config, format = later("llama", novelty=2.0), FORMATS[name]
    assert unusual_traits(config) == ("novelty",)
    assert not holds(format, config, config.full_spec)
    with pytest.raises(FlextronError, match="without novelty"):
        format.widths(config, config.full_spec)
    assert holds(format, replace(config, novelty=1.0), config.full_spec)

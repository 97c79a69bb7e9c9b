"""What a launcher says of the processes that it started; `torchrun` and `accelerate launch` do so by variables.

It imports no library of models, so that the command line can ask before it needs one.
"""

from __future__ import annotations

import os

__all__ = ["is_first_launched", "num_launched"]


def num_launched() -> int:
    """Processes that a launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first_launched() -> bool:
    """Whether this is the first process of a launcher, or the only one; needs no contact with the others."""
    return num_launched() == 1 or os.environ.get("RANK", "0") == "0"

"""A rank of an engine as a process of its own: `python -m flextron.engine.companion RANK RANKS PORT`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from flextron.engine.ranks import follow
from flextron.parallel.companions import LostRankError, join_started

__all__ = ["main"]


def main(rank: int, num_ranks: int, port: int) -> None:
    """Serve the first rank until it is done, or gone; it tells what became of the others."""
    join_started(rank, num_ranks, port)
    with suppress(LostRankError):
        follow()
    # the threads of collectives need not be waited for
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""When requests arrive: a renewal process with gamma gaps, of which the Poisson process is one.

Open loop: arrivals do not wait for answers, because users do not either. A slow server gets a queue, not less load.
"""

from __future__ import annotations

import random
from itertools import accumulate

from flextron.errors import FlextronError

__all__ = ["arrival_times"]


def arrival_times(num_requests: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds after the start at which requests arrive, ascending.

    Args:
        num_requests: how many.
        rate: requests per second, on average.
        burstiness: shape of the gamma distribution of gaps; 1 is Poisson, below 1 comes in bursts (the squared
            coefficient of variation is its reciprocal), far above 1 is nearly regular.
        seed: seed of the draws; equal seeds give equal times.

    Raises:
        FlextronError: a value is not positive.
    """
    for name, value in (("number of requests", num_requests), ("rate", rate), ("burstiness", burstiness)):
        if not 0 < value < float("inf"):
            raise FlextronError(f"the {name} must be positive and finite, not {value:g}")
    draws = random.Random(f"arrivals {seed}")
    scale = 1 / (rate * burstiness)
    return list(accumulate(draws.gammavariate(burstiness, scale) for _ in range(num_requests)))

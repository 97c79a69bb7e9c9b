"""Whose turn it is: every job in training gets the same number of trained tokens over time.

Stride scheduling: each job has a pass, the tokens that it has had; the job with the lowest pass goes next. Between two
jobs that are both there all the time, passes never differ by more than the largest step. A job that joins starts at the
lowest pass of the others, so that it neither catches up on what it missed nor waits.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Shares"]


class Shares:
    """Passes of the jobs that take turns."""

    def __init__(self) -> None:
        """No job yet."""
        self._passes: dict[str, int] = {}

    def keep(self, job_ids: Iterable[str]) -> None:
        """These jobs take turns from now on; others leave."""
        wanted = list(job_ids)
        stay = {i: self._passes[i] for i in wanted if i in self._passes}
        start = min(stay.values(), default=0)
        self._passes = {i: stay.get(i, start) for i in wanted}

    def next(self) -> str | None:
        """The job whose turn it is, the first kept of those that are equal; None if there is no job."""
        return min(self._passes, key=self._passes.__getitem__, default=None)

    def charge(self, job_id: str, num_tokens: int) -> None:
        """A job had so many tokens."""
        # a step without a token still was a turn
        self._passes[job_id] += max(1, num_tokens)

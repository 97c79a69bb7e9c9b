"""Jobs over a directory of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron.jobs.jobs import Jobs
from tests.finetuning.bigram import BigramMaker
from tests.jobs.making import new_jobs


@pytest.fixture
def maker() -> BigramMaker:
    return BigramMaker()


@pytest.fixture
def jobs(tmp_path: Path, maker: BigramMaker) -> Iterator[Jobs]:
    made = new_jobs(tmp_path / "state", maker)
    yield made
    made.close()

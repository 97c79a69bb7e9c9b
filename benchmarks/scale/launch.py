"""Jobs on one process or several: JSON in, JSON out of the first process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["launched"]


def launched(job: str, num_processes: int, **options: Any) -> Any:
    """What a job of `benchmarks.scale.worker` found.

    Args:
        job: name of a function there.
        num_processes: 1 runs it without a launcher.
        options: its keywords, as JSON can say them.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.json"
        launcher = [sys.executable]
        if num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command = [*launcher, "-m", "benchmarks.scale.worker", job, json.dumps(options), str(answer)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not answer.exists():
            raise RuntimeError(f"{job} on {num_processes} processes failed:\n{found.stderr[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))

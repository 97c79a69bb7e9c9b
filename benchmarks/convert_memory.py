"""Peak memory of `convert` and `save` on a checkpoint, in a process of its own: prints JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

from flextron.api import convert
from tests.tiny import make_tiny_llama

_TEXT = ["The river ran past the mill, and the miller counted his sacks. " * 400] * 40


def status(key: str) -> int:
    """A line of the process's status that is in kB, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Convert a tiny checkpoint first, so that imports and pools are not counted; then the one named."""
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        tiny = Path(directory) / "tiny"
        make_tiny_llama(tiny)
        convert(tiny, calibration=_TEXT).save(Path(directory) / "tiny-elastic")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = status("VmRSS")
        convert(source, calibration=_TEXT).save(Path(directory) / "elastic")
        peak = status("VmHWM") - before
    shards = sorted(source.glob("*.safetensors"))
    model = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            model += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    print(
        json.dumps(
            {
                "peak_bytes": peak,
                "model_bytes": model,
                "largest_shard_bytes": max(shard.stat().st_size for shard in shards),
                "num_shards": len(shards),
            }
        )
    )


if __name__ == "__main__":
    main()

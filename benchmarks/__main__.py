"""`python -m benchmarks [--history] [suite …]`: run suites; by default all but `gpu`.

`python -m benchmarks gpu [--rehearse]` needs a CUDA device, or runs its rows with a tiny model on the CPU.

With `--history` the figures are added to `benchmarks/results/history.jsonl`, and ratios that have become more than 5 %
worse since the last run on the same machine are named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.history import HISTORY, append, entries_of, read_history, worse

SUITES = ("core", "routing", "serving", "coserving", "quality", "ecosystem", "scale", "page")
"""Modules of this package with a function `run`; a suite is imported when it runs, as each has needs of its own."""


def _run(name: str, *, rehearse: bool) -> bool:
    suite = import_module(f"benchmarks.{name}")
    return suite.run(rehearse=True) if rehearse else suite.run()


def keep(names: Sequence[str], results: Path = RESULTS) -> bool:
    """Add what these suites have just measured to the history; whether no ratio has become worse."""
    history = results / HISTORY.name
    files = [results / f"{name}{suffix}.json" for name in names for suffix in ("", "-gpu")]
    # a suite writes one of the two: the one of the machine it ran on
    newest = {f.stem.removesuffix("-gpu"): f for f in sorted((f for f in files if f.exists()), key=_written)}
    entries = [e for file in newest.values() for e in entries_of(json.loads(file.read_text(encoding="utf-8")))]
    changes = worse(read_history(history), entries)
    append(history, entries)
    print(f"{len(entries)} figures added to {history}")
    for change in changes:
        print(f"worse: {change}")
    return not changes


def _written(path: Path) -> float:
    return path.stat().st_mtime


def main() -> int:
    """Exit code 1 where a figure misses its bar, or a ratio has become worse."""
    arguments = sys.argv[1:]
    keeps, rehearse = "--history" in arguments, "--rehearse" in arguments
    names = [name for name in arguments if name not in ("--history", "--rehearse")] or list(SUITES)
    unknown = [name for name in names if name not in (*SUITES, "gpu")]
    if unknown:
        print(f"unknown suite {unknown[0]}; there are {', '.join(SUITES)} and gpu", file=sys.stderr)
        return 2
    if rehearse and (names != ["gpu"] or keeps):
        print("--rehearse goes with the suite gpu alone", file=sys.stderr)
        return 2
    hold = [_run(name, rehearse=rehearse) for name in names]
    kept = keep(names) if keeps else True
    return 0 if all(hold) and kept else 1


if __name__ == "__main__":
    sys.exit(main())

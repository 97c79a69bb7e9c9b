"""`python -m experiments.reproduction --scale smoke|cpu|gpu --data PATH --output DIRECTORY`.

Runs that have finished are not repeated: a killed experiment goes on with the same command. Where settings have
changed, `--again` repeats the runs that depend on them, and no others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from experiments.reproduction.command import command_options, command_parser, run_command, scale_of
from experiments.reproduction.data import Data, prepare
from experiments.reproduction.plan import execute, jobs
from experiments.reproduction.report import write_report
from experiments.reproduction.scales import Scale
from experiments.reproduction.setting import Setting
from flextron.cli.console import message
from flextron.errors import FlextronError

__all__ = ["main", "reproduce", "settings"]


def _data(scale: Scale, source: str, output: Path) -> Data:
    return prepare(
        output / "data",
        source,
        vocab_size=scale.vocab_size,
        num_train_tokens=scale.tokens,
        num_search_tokens=scale.num_search_tokens,
        num_validation_tokens=scale.num_validation_tokens,
        context=scale.context,
    )


def settings(scale: Scale, data: Data, output: Path) -> list[Setting]:
    """Every family and seed of a scale."""
    return [Setting.of(scale, family, seed, data, output) for family, n in scale.seeds.items() for seed in range(n)]


def reproduce(
    scale: Scale, source: str, output: Path, *, only: str | None = None, again: bool = False, num_jobs: int = 1
) -> None:
    """Do all runs that are not done yet, then write the report.

    Args:
        scale: how large.
        source: text: file, directory, glob or `datasets` id.
        output: directory of everything.
        only: a family and seed such as `llama-0`; no report is written then.
        again: delete runs that were done with other settings, instead of refusing.
        num_jobs: families and seeds that run at once, in processes of their own.

    Raises:
        FlextronError: the text is too short, or a run was done with other settings.
    """
    message(f"text and tokenizer: {output / 'data'}")
    everything = settings(scale, _data(scale, source, output), output)
    chosen = [s for s in everything if only in (None, s.store.path.name)]
    if not chosen:
        raise FlextronError(f"no family and seed {only!r}; there are {[s.store.path.name for s in everything]}")
    for setting in chosen:
        for job in jobs(setting):
            if again:
                setting.store.discard_outdated(job.name)
            setting.store.result(job.name)  # refuses those done with other settings before anything runs
    if num_jobs > 1 and len(chosen) > 1:
        _in_processes(chosen, source, output, num_jobs)
    else:
        for setting in chosen:
            execute(setting)
    if only is None:
        write_report(chosen, output)


def _in_processes(chosen: Sequence[Setting], source: str, output: Path, num_jobs: int) -> None:
    """One process a family and seed; the cores are shared out."""
    threads = max(1, (os.cpu_count() or 1) // num_jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def run(setting: Setting) -> int:
        command = [sys.executable, "-m", "experiments.reproduction", *command_options(setting.scale)]
        command += ["--data", source, "--output", str(output), "--only", setting.store.path.name]
        return subprocess.run(command, env=environment, check=False).returncode

    with ThreadPoolExecutor(num_jobs) as pool:
        failed = [s.store.path.name for s, code in zip(chosen, pool.map(run, chosen), strict=True) if code]
    if failed:
        raise FlextronError(f"{', '.join(failed)} did not finish; run the same command again to go on")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 where something is wrong with the input."""
    parser = command_parser("experiments.reproduction", __doc__, scale="smoke")
    parser.add_argument("--data", required=True, help="text: file, directory, glob or datasets id")
    parser.add_argument("--output", type=Path, default=Path("out/reproduction"), help="directory of everything")
    parser.add_argument("--only", help="one family and seed, such as llama-0; writes no report")
    parser.add_argument("--again", action="store_true", help="repeat runs that were done with other settings")
    parser.add_argument("--jobs", type=int, default=1, help="families and seeds that run at once")
    parsed = parser.parse_args(arguments)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")

    def act() -> None:
        scale = scale_of(parsed)
        reproduce(scale, parsed.data, parsed.output, only=parsed.only, again=parsed.again, num_jobs=parsed.jobs)

    return run_command(act)


if __name__ == "__main__":
    sys.exit(main())

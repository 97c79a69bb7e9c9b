"""`python -m benchmarks.readme`: puts the measured figures into README.md and docs/benchmarks.md.

Both files hold a block between a line `<!-- figures … -->` and a line `<!-- /figures -->`. This script makes what is
between them from `benchmarks/results/*.json`: six headline figures for the README, all figures for the documentation.
With `--check` it writes nothing, and the exit code is 1 if a file is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextron.errors import FlextronError

__all__ = ["HEADLINES", "Headline", "fill", "full", "headline_table", "main"]

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^(<!-- figures\b[^\n]*-->\n)(.*?)^(<!-- /figures -->)$", re.MULTILINE | re.DOTALL)
_SIGNS = {"<=": "≤", ">=": "≥", "==": "="}

Results = dict[str, dict[str, Any]]
"""What the suites wrote, by file name without its suffix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """A figure that the README shows."""

    suite: str
    """Name of the result file, without its suffix."""
    figure: str
    """The figure's name in that file."""
    title: str
    """The figure in the README's words."""
    instead: str
    """What a user would choose otherwise."""


HEADLINES = (
    Headline(
        suite="core",
        figure="decode speed-up at target 0.5, batch 1",
        title="decode speed of the sub-network for half the latency",
        instead="the full model",
    ),
    Headline(
        suite="routing",
        figure="Flextron against each variant trained end to end: comparisons with no higher loss",
        title="cases in which a sub-network is at least as good as a dense model trained for its size",
        instead="a full training for each size",
    ),
    Headline(
        suite="quality",
        figure="loss left at latency 0.5, adapter in the package; the worse of WikiText-2 and LAMBADA",
        title="of what that sub-network lost before training, it still loses",
        instead="the same layers and widths of the pretrained model",
    ),
    Headline(
        suite="serving",
        figure="decode at batch 1, int8, against llama.cpp's Q8_0",
        title="decode speed with int8 weights, batch 1",
        instead="llama.cpp, Q8_0",
    ),
    Headline(
        suite="serving",
        figure="offline throughput, 64 requests, float32, against transformers' continuous batching",
        title="throughput, 64 requests",
        instead="continuous batching of transformers",
    ),
    Headline(
        suite="coserving",
        figure="finetuning beside a heavy load, tokens a second, against the best other way at equal attainment",
        title="LoRA finetuning speed on a busy server, same latency objectives",
        instead="finetuning steps only while the server is idle",
    ),
)
"""The README shows these figures in this order. Misses stay in."""


def read_results(directory: Path) -> Results:
    """All result files of a directory, in the order of their names; none if there is no such directory.

    Raises:
        FlextronError: a file is not what `benchmarks.harness.run_suite` writes.
    """
    results: Results = {}
    for path in sorted(directory.glob("*.json"), key=lambda path: path.stem):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for key in ("suite", "commit", "date", "hardware", "versions", "figures"):
                data[key]
        except (ValueError, KeyError, TypeError) as error:
            raise FlextronError(f"{path} is no result of a suite ({error}); run `make bench` again") from error
        results[path.stem] = data
    return results


def _cells(*values: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(value.replace("|", r"\|").replace("\n", " ") for value in values) + " |"


def _header(*names: str) -> list[str]:
    return [_cells(*names), "|" + "---|" * len(names)]


def _value(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.4g} {figure['unit']}".strip()


def _bar(figure: dict[str, Any]) -> str:
    missed = "" if figure["holds"] else ", **missed**"
    return f"{_SIGNS[figure['op']]} {figure['bar']:.4g}{missed}"


def _peer(figure: dict[str, Any]) -> str:
    peer = figure["peer"]
    return f"{peer['name']}: {peer['value']:.4g}" if peer else ""


def _spread(figure: dict[str, Any]) -> str:
    return " / ".join(f"{x:.4g}" for x in figure["spread"] or ())


def _machine(result: dict[str, Any]) -> str:
    """What it was measured on, in a few words."""
    hardware = result["hardware"]
    cpu = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    return f"{hardware['gpu']}, {cpu}" if hardware["gpu"] else cpu


def _instead(headline: Headline, figure: dict[str, Any]) -> str:
    """What a user would choose otherwise, with what the same run measured for it: `llama.cpp: 117.4 tokens/s`."""
    if not figure["peer"]:
        return headline.instead
    _, separator, unit = figure["peer"]["name"].rpartition(", ")
    return f"{headline.instead}: {figure['peer']['value']:.4g} {unit if separator else ''}".rstrip()


def headline_table(results: Results, headlines: Sequence[Headline] = HEADLINES) -> str:
    """The README's block: the headline figures of the suites that have run, where they ran, and how many figures miss.

    Raises:
        FlextronError: a suite has run and lacks a headline figure.
    """
    rows = []
    for headline in headlines:
        if headline.suite not in results:
            continue
        found = {f["name"]: f for f in results[headline.suite]["figures"]}.get(headline.figure)
        if found is None:
            raise FlextronError(
                f"benchmarks/results/{headline.suite}.json has no figure {headline.figure!r}; change HEADLINES"
            )
        rows.append(_cells(headline.title, _value(found), _instead(headline, found), _bar(found)))
    if not rows:
        return ""
    figures = [f for result in results.values() for f in result["figures"]]
    missed = sum(not f["holds"] for f in figures)
    where = "; ".join(dict.fromkeys(_machine(r) for r in results.values()))
    return "\n".join(
        [
            *_header("figure", "measured", "instead of", "goal"),
            *rows,
            "",
            f"Measured by `make bench` ({where}). Of all {len(figures)} figures {missed} miss their goal; "
            "[benchmarks](docs/benchmarks.md) shows them all.",
            "",
        ]
    )


def full(results: Results) -> str:
    """The documentation's block: for each suite its machine, versions and commit, and a table with spread and notes."""
    lines: list[str] = []
    for name, result in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        lines += [
            f"### {name}",
            "",
            f"{_machine(result)}. {versions}. Commit {result['commit']}, {result['date']}.",
            "",
        ]
        lines += _header("figure", "value", "bar", "smallest / median / largest", "peer", "note")
        lines += [_cells(f["name"], _value(f), _bar(f), _spread(f), _peer(f), f["note"]) for f in result["figures"]]
        lines.append("")
        for title, reason in result.get("left_out", {}).items():
            lines += [f"Left out: {title}. {reason}", ""]
    return "\n".join(lines)


def fill(text: str, body: str) -> str:
    """A page with `body` between its two markers.

    Raises:
        FlextronError: the page does not have exactly one block.
    """
    if len(_BLOCK.findall(text)) != 1:
        raise FlextronError("the page needs exactly one block from <!-- figures --> to <!-- /figures -->")
    between = f"\n{body.strip()}\n\n" if body.strip() else ""
    return _BLOCK.sub(lambda match: match[1] + between + match[3], text)


def main(arguments: Sequence[str], root: Path = ROOT, headlines: Sequence[Headline] = HEADLINES) -> int:
    """Fill the blocks, or with `--check` only compare.

    Returns:
        Exit code: 0 if all is up to date, 1 if `--check` found a page that is not, 2 for bad input.
    """
    if set(arguments) - {"--check"}:
        print("usage: python -m benchmarks.readme [--check]", file=sys.stderr)
        return 2
    pages: dict[str, Callable[[Results], str]] = {
        "README.md": lambda results: headline_table(results, headlines),
        "docs/benchmarks.md": full,
    }
    stale = []
    try:
        results = read_results(root / "benchmarks" / "results")
        for name, body in pages.items():
            old = (root / name).read_text(encoding="utf-8")
            new = fill(old, body(results))
            if new != old:
                stale.append(name)
                if not arguments:
                    (root / name).write_text(new, encoding="utf-8")
    except (FlextronError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in stale:
        print(f"{name} {'is out of date; run python -m benchmarks.readme' if arguments else 'written'}")
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m benchmarks.readme`: puts the measured figures into README.md and docs/benchmarks.md.

Both files hold a block between a line `<!-- figures … -->` and a line `<!-- /figures -->`. What stands between them is
made here from `benchmarks/results/*.json` and from nothing else. With `--check` nothing is written, and the exit code
is 1 where a file is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flextron.errors import FlextronError

__all__ = ["compact", "fill", "full", "main"]

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^(<!-- figures\b[^\n]*-->\n)(.*?)^(<!-- /figures -->)$", re.MULTILINE | re.DOTALL)
_SIGNS = {"<=": "≤", ">=": "≥", "==": "="}
_PICTURE = "docs/images/frontier.png"

Results = dict[str, dict[str, Any]]
"""What the suites wrote, by file name without its suffix."""


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
    missed = "" if figure["holds"] else ", missed"
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


def compact(results: Results, *, picture: bool) -> str:
    """The README's block: the picture, one table of all suites, and where they ran."""
    lines = [f"![frontier]({_PICTURE})", ""] if picture else []
    if results:
        lines += _header("figure", "value", "bar", "peer")
        for result in results.values():
            lines += [_cells(f["name"], _value(f), _bar(f), _peer(f)) for f in result["figures"]]
        where = "; ".join(f"{name}: {_machine(r)}, commit {r['commit']}" for name, r in results.items())
        lines += ["", f"Measured by `make bench` ({where}). All notes are in [benchmarks](docs/benchmarks.md).", ""]
    return "\n".join(lines)


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


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Fill the blocks, or with `--check` only compare.

    Returns:
        Exit code: 0 if all is up to date, 1 if `--check` found a page that is not, 2 for bad input.
    """
    if set(arguments) - {"--check"}:
        print("usage: python -m benchmarks.readme [--check]", file=sys.stderr)
        return 2
    pages: dict[str, Callable[[Results], str]] = {
        "README.md": lambda results: compact(results, picture=(root / _PICTURE).exists()),
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

"""`python -m benchmarks [suite …]`: run suites; all by default."""

from __future__ import annotations

import sys

from benchmarks import core, coserving, ecosystem, quality, routing, scale, serving

SUITES = {
    "core": core.run,
    "routing": routing.run,
    "serving": serving.run,
    "coserving": coserving.run,
    "quality": quality.run,
    "ecosystem": ecosystem.run,
    "scale": scale.run,
}


def main() -> int:
    """Exit code 1 where a figure misses its bar."""
    names = sys.argv[1:] or list(SUITES)
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        print(f"unknown suite {unknown[0]}; there are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    hold = [SUITES[name]() for name in names]
    return 0 if all(hold) else 1


if __name__ == "__main__":
    sys.exit(main())

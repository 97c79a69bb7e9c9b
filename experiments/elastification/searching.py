"""What refinements of the search are worth, at equal numbers of measured sub-networks.

`python -m experiments.elastification.searching --data DIR` searches the package's elastic SmolLM2 on WikiText-2's
validation text, once with refinements and once with more rounds of proposals in their place, and measures the best
sub-network of each size on WikiText-2's test text, which no search has read. Sizes are shares of all parameters in the
layers, so that nothing depends on a device.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import flextron
from experiments.elastification.curve import wikitext
from flextron.api.packaged import boxed_adapter
from flextron.api.texts import needed, sequences
from flextron.routing import LatencyTable, SearchSettings, search_frontier
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import Target
from flextron.workflows.demo import default_model

__all__ = ["main"]

_CONTEXT = 256
_TARGETS = (0.85, 0.7, 0.55, 0.4)
_SETTINGS = {
    "2 rounds": SearchSettings(targets=_TARGETS, rounds=2, refinements=0),
    "6 rounds": SearchSettings(targets=_TARGETS, rounds=6, refinements=0),
    "2 rounds, 1 refinement": SearchSettings(targets=_TARGETS, rounds=2, refinements=1),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    args = parser.parse_args()
    model = flextron.load(default_model(), elastic=boxed_adapter())
    tokenizer, decoder = needed(model.tokenizer), model.decoder
    table = LatencyTable.of_parameters(decoder.config, model.space)
    found_on, judged_on = (
        sequences([wikitext(args.data, part)], tokenizer, num_tokens=count * args.tokens, context=_CONTEXT)
        for part, count in (("wt2.valid.tokens.txt.zst", 2), ("wiki.test.raw.zst", 2))
    )
    half = len(found_on) // 2
    print(f"{'search':26}{'measured':>9}" + "".join(f"{target:>16}" for target in _TARGETS))  # noqa: T201
    for name, settings in _SETTINGS.items():
        frontier = search_frontier(
            decoder,
            model.space,
            table,
            calibration_BT=found_on[:half],
            validation_BT=found_on[half:],
            text="WikiText-2 validation",
            settings=settings,
        )
        cells = []
        for target in _TARGETS:
            point = frontier.select(Target(latency=target))
            cells.append(f"{point.loss:8.3f}{mean_loss(decoder, judged_on, point.spec):8.3f}")
        print(f"{name:26}{len(frontier.points):9}" + "".join(cells), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

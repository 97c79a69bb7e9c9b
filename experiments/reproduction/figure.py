"""The picture: validation loss over parameters, a panel for each family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flextron.errors import FlextronError

__all__ = ["draw"]

_STYLES = {
    "end to end": ("s", "black"),
    "Flextron": ("o", "tab:blue"),
    "MatFormer-type": ("^", "tab:orange"),
    "SortedNet-type": ("v", "tab:green"),
    "Minitron-type": ("D", "tab:red"),
    "Minitron-type, shared tokens": ("d", "tab:pink"),
}


def draw(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw means over seeds into one PNG.

    Raises:
        FlextronError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise FlextronError("drawing needs matplotlib; install flextron[demo]") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    families = list(dict.fromkeys(row["family"] for row in summary))
    figure, axes = plt.subplots(1, len(families), figsize=(6 * len(families), 4.5), dpi=150, squeeze=False)
    for panel, family in zip(axes[0], families, strict=True):
        for method, (marker, colour) in _STYLES.items():
            # the base is the end-to-end curve's right end
            named = {method, "base"} if method == "end to end" else {method}
            points = sorted(
                (r["block_params"], r["loss"]) for r in summary if r["family"] == family and r["method"] in named
            )
            panel.plot(*zip(*points, strict=True), marker=marker, color=colour, label=method, ms=5, lw=1.2)
        panel.set(title=family, xlabel="block parameters", ylabel="validation loss (nats a token)")
        panel.grid(visible=True, alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

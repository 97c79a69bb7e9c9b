"""The picture of the co-serving sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(sweeps: Sequence[dict[str, Any]], path: Path) -> None:
    """Finetuning kept and attainment over the load, a panel for each model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(sweeps), figsize=(5.5 * len(sweeps), 4), dpi=150, squeeze=False)
    for axes, sweep in zip(panels[0], sweeps, strict=True):
        rows = sweep["rows"]
        share = [100 * row["share_of_capacity"] for row in rows]
        axes.plot(share, [100 * row["trained_share_of_peak"] for row in rows], "o-", label="finetuning, of its peak")
        axes.plot(share, [100 * row["limit_share_of_peak"] for row in rows], ":", label="limit on paper")
        served = [row for row in rows if row["num_requests"]]
        share = [100 * row["share_of_capacity"] for row in served]
        axes.plot(share, [100 * row["attainment_alone"] for row in served], "s--", label="attainment, inference alone")
        axes.plot(share, [100 * row["attainment"] for row in served], "x-", label="attainment beside finetuning")
        axes.set(
            title="{model}: TPOT within {tpot_slo_ms:.3g} ms, TTFT within {ttft_slo_ms:.3g} ms".format(**sweep),
            xlabel="load, % of capacity",
            ylabel="%",
            ylim=(0, 105),
        )
        axes.title.set_fontsize(9)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

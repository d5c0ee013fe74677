"""A picture of a try-out of rewards."""

from pathlib import Path
from typing import Any

import numpy as np

from .style import KEY, new_figure, save_figure


def draw_tryout(found: Any, path: Path) -> None:
    """Mean of each reward and of their sum (columns) by kind of completion (rows); red: as good as the truth.

    `found` is a Tryout of prunekit/training/reward_tryout.py.
    """
    names, kinds = list(found.weights), list(found.kinds)
    means = np.array([[found.mean(name, kind) for name in names] for kind in kinds])
    totals = np.array([found.totals(kind).mean() for kind in kinds])
    cells = np.column_stack([means, totals])
    # Each column has colours of its own: from its lowest to its highest.
    known = np.nan_to_num(cells)  # a reward may say nothing of some kind
    low, spread = known.min(0), np.maximum(np.ptp(known, axis=0), 1e-9)
    figure, axes = new_figure(1, 2.2 + 1.1 * cells.shape[1], 1.0 + 0.27 * len(kinds))
    axis = axes[0][0]
    shades = (known - low) / spread
    axis.imshow(shades, cmap="YlGnBu", vmin=0, vmax=1.4, aspect="auto", interpolation="nearest")
    for row, column in np.ndindex(*cells.shape):
        bad = column == len(names) and kinds[row] not in ("truth", "model") and cells[row, -1] >= totals[0] - 1e-9
        style = {"color": KEY, "weight": "bold"} if bad else {"color": "white"} if shades[row, column] > 0.8 else {}
        text = "none" if np.isnan(cells[row, column]) else f"{cells[row, column]:.2f}"
        axis.text(column, row, text, ha="center", va="center", **style)
    axis.axvline(len(names) - 0.5, color="white", linewidth=3)
    axis.grid(visible=False)
    axis.set_xticks(range(cells.shape[1]), [*names, "total"], rotation=20, ha="right")
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_title("mean reward by completion")
    save_figure(figure, path)

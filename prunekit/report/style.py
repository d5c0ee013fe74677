"""Colours of all pictures, and how one is begun and written."""

import os
from pathlib import Path
from typing import Any

INK, MUTED, GRID = "#222222", "#6b7280", "#e5e7eb"
FREE, RECOVERS, KEY = "#2a9d8f", "#e9a23b", "#c8553d"  # over 95%, over 90%, below
WARM = ("#c8553d", "#e9a23b", "#b5446e", "#8c2f1b", "#d98880", "#a67c1a", "#7a3b69", "#f08a5d")
COOL = ("#2f6fb0", "#2a9d8f", "#8a5fb0", "#6aaed6", "#57803a", "#26547c", "#7fc8b8", "#9a9ad1", "#4d6a8a", "#a3c585")
PALE = "#c5cad3"
LINES = ("#2f6fb0", "#c8553d", "#2a9d8f", "#8a5fb0")


def new_figure(columns: int, width: float, height: float, rows: int = 1, **layout: Any):
    """A figure in our style, in inches, and the axes of its panels (rows, columns); `layout` is the grid's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
            "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "axes.titleweight": "bold",
            "axes.titlelocation": "left", "axes.titlesize": 10,
            "text.parse_math": False,  # what lies between two dollars of a name is no formula
        }
    )  # fmt: skip
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", gridspec_kw=layout)


def save_figure(figure, path: Path) -> None:
    """Write a PNG, which is whole or as before, and forget the figure."""
    import matplotlib.pyplot as plt

    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


def share_colour(share: float) -> str:
    """Of what is left of a baseline."""
    return FREE if share >= 0.95 else RECOVERS if share >= 0.90 else KEY

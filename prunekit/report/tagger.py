"""F1 of taggers by entity type."""

from pathlib import Path
from typing import Any

from .style import PALE, new_figure, save_figure, share_colour


def draw_f1(models: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """F1 of each entity type (rows) for each named model (columns), coloured by its share of the first model's.

    The scores are those of `ner.entity_scores`; types that no row of the data has are left out.
    """
    first = models[0][1]
    types = [name for name, row in first["entities"].items() if row["support"]]
    names = ["all", *sorted(types, key=lambda name: -first["entities"][name]["support"])]
    counts = {name: first["entities"][name]["support"] for name in types}
    counts["all"] = sum(counts.values())

    def f1(scores: dict[str, Any], name: str) -> float:
        row = scores if name == "all" else scores["entities"].get(name)
        return row["f1"] if row else 0.0

    figure, axes = new_figure(1, 2.6 + 1.25 * len(models), 1.0 + 0.27 * len(names))
    axis = axes[0][0]
    for column, (_, scores) in enumerate(models):
        for place, name in enumerate(names):
            value, base = f1(scores, name), f1(first, name)
            colour = PALE if not column else share_colour(value / base if base else 1.0)
            axis.barh(place, 0.94, height=0.88, left=column - 0.47, color=colour, alpha=0.55)
            weight = "bold" if name == "all" else None
            axis.text(column, place, f"{value:.3f}", ha="center", va="center", fontsize=8, fontweight=weight)
    axis.set_xticks(range(len(models)), [name for name, _ in models])
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), [f"{name}  ({counts[name]})" for name in names])
    axis.set_xlim(-0.5, len(models) - 0.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.supxlabel("F1 by entity type (how many)\ngreen: over 95% of the first model's, amber: over 90%", fontsize=8)
    save_figure(figure, path)

"""The way of a model through its stages: size and quality."""

from pathlib import Path
from typing import Any

from .style import INK, LINES, MUTED, new_figure, save_figure


def shared_groups(stages: list[dict[str, Any]]) -> list[str]:
    """The groups of rows whose exact match is known at every stage, by name."""
    known = [{g for g, scores in stage.get("groups", {}).items() if "exact_match" in scores} for stage in stages]
    return sorted(set.intersection(*known))


def draw_stages(stages: list[dict[str, Any]], path: Path) -> None:
    """Size and quality of a model after each stage, and a map of each group's; rows as in the demo's summary.json."""
    groups = shared_groups(stages)
    width = 1.2 + 0.36 * len(stages)
    widths = [4.2, 4.2, width] if groups else [4.2, 4.2]
    figure, axes = new_figure(len(widths), 1.2 + sum(widths), 3.6, width_ratios=widths)
    names = [stage["stage"] for stage in stages]
    places = list(range(len(stages)))
    base = stages[0]
    for key, label, colour in (
        ("parameters", "parameters", LINES[0]),
        ("kv_bytes_per_token", "KV bytes per token", LINES[1]),
    ):
        shares = [stage[key] / (base[key] or 1) for stage in stages]  # an encoder has no KV cache
        axes[0][0].plot(places, shares, marker="o", markersize=4, color=colour, label=label)
    axes[0][0].set_ylim(0, 1.08)
    axes[0][0].set_title("size, share of the base model's")
    for key, colour in (("token_acc", LINES[0]), ("exact_match", LINES[2])):
        values = [stage[key] for stage in stages]
        axes[0][1].plot(places, values, marker="o", markersize=4, color=colour, label=key)
    axes[0][1].axhline(base["exact_match"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes[0][1].set_ylim(0, 1.05)
    axes[0][1].set_title("quality on held-out rows")
    for axis in axes[0]:
        axis.set_xticks(places, names, rotation=40, ha="right")
    for axis in axes[0][:2]:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.legend(frameon=False, fontsize=8)
    if groups:
        _draw_groups(axes[0][2], stages, groups)
    save_figure(figure, path)


def _draw_groups(axis, stages: list[dict[str, Any]], groups: list[str]) -> None:
    """Exact match in per cent, the paler the lower against the first stage's of the same group."""
    import numpy as np

    exact = np.array([[stage["groups"][group]["exact_match"] for stage in stages] for group in groups])
    kept = exact / np.maximum(exact[:, :1], 1e-9)
    axis.imshow(kept, cmap="YlGn", vmin=0, vmax=1.6, aspect="auto", interpolation="nearest")
    for place, row in enumerate(exact):
        for stage, value in enumerate(row):
            axis.text(stage, place, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=INK)
    axis.set_yticks(range(len(groups)), groups)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title("exact match by group, %")

"""The way of a model through its stages: size and quality."""

from pathlib import Path
from typing import Any

from .style import LINES, MUTED, new_figure, save_figure


def draw_stages(stages: list[dict[str, Any]], path: Path) -> None:
    """Size and quality of a model after each stage; rows as in the demo's summary.json."""
    figure, axes = new_figure(2, 9.6, 3.6)
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
    axes[0][1].set_title("quality on held-out words")
    for axis in axes[0]:
        axis.set_xticks(places, names, rotation=40, ha="right")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)

"""Quality against size, of models measured side by side and of the stages that led to them."""

from pathlib import Path
from typing import Any

from .style import INK, LINES, MUTED, new_figure, save_figure


def draw_way(measured: list[dict[str, Any]], logged: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Points have name, parameters and kv_bytes_per_token (shares of the base's) and quality.

    `measured`: by `metric`, the base first, with `low` and `high` where there is an interval; `logged`: token_acc on
    the validation rows of each stage's own training, in the order of the stages.
    """
    figure, axes = new_figure(2, 9.6, 3.8)
    for axis, key, label in (
        (axes[0][0], "parameters", "parameters"), (axes[0][1], "kv_bytes_per_token", "KV bytes per token"),
    ):  # fmt: skip
        if logged:
            shares, values = [point[key] for point in logged], [point["quality"] for point in logged]
            axis.plot(shares, values, color=MUTED, marker="o", markersize=4, markerfacecolor="white", linewidth=0.9,
                      linestyle=(0, (3, 2)), label="token_acc as its training logged it")  # fmt: skip
        for number, point in enumerate(measured):
            colour = MUTED if number == 0 else LINES[(number - 1) % len(LINES)]
            if "low" in point:
                axis.plot([point[key]] * 2, [point["low"], point["high"]], color=colour, linewidth=3, alpha=0.35)
            axis.plot(point[key], point["quality"], marker="D", markersize=6, color=colour, linestyle="none",
                      label=point["name"])  # fmt: skip
        axis.set_xlabel(f"{label}, share of the base's", color=INK)
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.invert_xaxis()
        axis.margins(0.12)
    axes[0][0].set_title(f"{metric} against size")
    axes[0][1].legend(frameon=False, fontsize=8, loc="best")
    save_figure(figure, path)

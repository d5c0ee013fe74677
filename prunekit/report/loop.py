"""The way of a loop: what each round kept, at which size."""

import itertools
from pathlib import Path
from typing import Any

from .style import FREE, INK, KEY, MUTED, PALE, new_figure, save_figure

LABELS = {"params": "parameters", "bytes": "bytes of weights", "kv": "KV bytes a token", "speed": "seconds"}


def draw_loop(loop: dict[str, Any], path: Path) -> None:
    """Kept quality against size, a panel for each target, from loop.json's content: rounds by their numbers.

    The gate and a target that isn't far off are dashed; what failed is red, and hangs on the round that it was cut
    from. Stages behind the last round have their names.
    """
    settings, base = loop["settings"], loop["base"]["sizes"]
    judged = [each for each in loop["rounds"] if each.get("sizes")]
    figure, axes = new_figure(len(settings["targets"]), 6.4 * len(settings["targets"]), 3.6)
    for axis, (unit, target) in zip(axes[0], settings["targets"].items()):
        places = {0: (1.0, 1.0)} | {each["round"]: (each["sizes"][unit] / base[unit], each["kept"]) for each in judged}
        for each in judged:
            line = (places[each["from"]], places[each["round"]])
            axis.plot(*zip(*line), color=INK if each["good"] else PALE, linewidth=1.3, zorder=1)
        above = itertools.cycle((6, 14))  # neighbours at one height would read as one number
        for number, (size, kept) in places.items():
            good = not number or next(each["good"] for each in judged if each["round"] == number)
            axis.plot(size, kept, marker="o", markersize=5, color=FREE if good else KEY)
            name = str(number) if number else "base"
            aside, side = ((0, next(above)), "center") if good else ((6, -4), "left")
            axis.annotate(name, (size, kept), xytext=aside, ha=side, textcoords="offset points", fontsize=8)
        start = next((places[each["round"]] for each in reversed(judged) if each["good"]), places[0])
        for each in loop.get("end", ()):
            if not each.get("sizes"):
                continue
            point = (each["sizes"][unit] / base[unit], each["kept"])
            axis.plot(*zip(start, point), color=INK if each["good"] else PALE, linewidth=1.3, zorder=1)
            axis.plot(*point, marker="D", markersize=5, color=FREE if each["good"] else KEY)
            axis.annotate(each["stage"], point, xytext=(5, -10), textcoords="offset points", fontsize=8)
            start = point if each["good"] else start
        axis.axhline(settings["keep"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        wanted, least = target / base[unit], min(size for size, _ in places.values())
        if 1 - wanted < 1.5 * (1 - least):
            axis.axvline(wanted, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        else:  # far off: all that was reached would be drawn in a corner
            axis.set_title(f"target: {wanted:.0%} →", loc="right", fontsize=8, color=MUTED)
        axis.set_xlabel(f"{LABELS[unit]}, share of the base's")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
        axis.invert_xaxis()
        axis.set_title(f"{settings['metric']}, kept of the base's")
    save_figure(figure, path)

"""Pictures of a ranking: what each removal costs, the greedy path, the curves of trained knockouts."""

import itertools
import math
from pathlib import Path
from typing import Any

from .style import COOL, GRID, INK, KEY, LINES, MUTED, PALE, WARM, new_figure, save_figure, share_colour

TITLES = {"text": "text layers", "vision": "vision blocks", "experts": "experts"}  # of panels


def _token_acc(ranking: dict[str, Any]) -> str:
    return f"token_acc, {'with' if ranking['counts_suffix'] else 'without'} the template's suffix"


def with_experts(ranking: dict[str, Any]) -> list[dict[str, Any]]:
    """What a ranking says of layers, and behind that of numbers of experts."""
    return [*ranking["removals"], *ranking.get("experts", ())]


def draw_ranking(ranking: dict[str, Any], path: Path) -> None:
    """What removing each layer, or experts, leaves of the baseline's token_acc, with lines at 95% and 90%.

    Bars are what the scan found, with its standard error, and diamonds what was left after the training; bars are
    trained values where there was no scan. What leaves less than 60% is a stub with its number. Of a ranking by groups
    of rows a map below says what each removal leaves of each group; by its gate `worst` bars are the worst group's.
    """
    from matplotlib.lines import Line2D

    drawn = with_experts(ranking)
    stacks = sorted({removal["stack"] for removal in drawn}, key=list(TITLES).index)
    by_stack = [
        sorted((r for r in drawn if r["stack"] == stack), key=lambda r: r["layer"] or -r.get("experts", 0))
        for stack in stacks
    ]
    widths = [max(3.6, 0.14 * len(removals)) for removals in by_stack]
    groups = sorted(drawn[0]["groups"]) if ranking.get("by") else []
    heights = [3.6, 0.7 + 0.2 * len(groups)] if groups else [3.6]
    figure, axes = new_figure(
        len(stacks), 1.5 + sum(widths) + (1.2 if groups else 0), sum(heights), len(heights),
        width_ratios=widths, height_ratios=heights,
    )  # fmt: skip
    scanned_any = any(removal["relative_scanned"] is not None for removal in drawn)
    trained_any = any(removal["relative_trained"] is not None for removal in drawn)
    baseline = ranking["baseline"] if scanned_any else ranking["baseline"]["trained"]

    def values(removal: dict[str, Any]) -> tuple[float | None, float | None]:
        """Height of the bar, place of the diamond."""
        trained = removal["relative_trained"]
        return (removal["relative_scanned"], trained) if scanned_any else (trained, None)

    shares = [value for removal in drawn for value in values(removal) if value is not None]
    low, high = min(0.88, *shares), max(1.0, *shares)
    floor = max(math.floor((low - 0.02) * 20) / 20, 0.6)
    stub = floor + 0.03 * (1 - floor)
    for axis, stack, removals, width in zip(axes[0], stacks, by_stack, widths):
        labelled = len(removals) <= 16
        for position, removal in enumerate(removals):
            bar, diamond = values(removal)
            if removal["relative"] is None:
                axis.text(position, stub, "failed", rotation=90, ha="center", va="bottom", color=KEY, fontsize=7)
                continue
            top = floor
            if bar is not None:
                top = max(bar, stub)
                axis.bar(
                    position, top - floor, bottom=floor, color=share_colour(bar), width=0.72,
                    hatch="" if bar > floor else "/////", edgecolor="white", linewidth=0,
                )  # fmt: skip
                scores, whole = _behind(removal, ranking)
                error = (scores.get("standard_error") or {}).get("token_acc")
                if scanned_any and error and bar > floor:
                    error /= whole["token_acc"]
                    axis.errorbar(position, bar, error, color=INK, linewidth=0.8)
                    top += error
            if diamond is not None:
                axis.plot(
                    position, max(diamond, stub), marker="D", markersize=5 if labelled else 4,
                    color=share_colour(diamond), markeredgecolor=INK, markeredgewidth=0.8,
                )  # fmt: skip
                top = max(top, max(diamond, stub) + 0.025 * (1 - floor))
            lines = [f"{bar * 100:.1f}"] if bar is not None and (labelled or bar < floor) else []
            if diamond is not None and (labelled or diamond < floor):
                lines.append(f"◆{diamond * 100:.1f}")
            axis.annotate(
                "\n".join(reversed(lines)) if labelled else " ".join(lines),
                (position, top), xytext=(0, 1.5), textcoords="offset points",
                ha="center", va="bottom", fontsize=7 if labelled else 6, color=INK, rotation=0 if labelled else 90,
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.3},  # or the line at its height crosses a number
            )  # fmt: skip
        for line, label in ((0.95, "95%"), (0.90, "90%")):
            axis.axhline(line, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.annotate(
                label, (1, line), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
                fontsize=7, color=MUTED, va="center",
            )  # fmt: skip
        step = math.ceil(0.21 * len(removals) / width)
        axis.set_xticks(range(0, len(removals), step), [str(r.get("experts", r["layer"])) for r in removals[::step]])
        axis.set_xlim(-0.6, len(removals) - 0.4)
        axis.set_ylim(floor, high + (high - floor) * 0.16)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(axis="x", visible=False)
        axis.set_title(TITLES[stack])
        what = "left in each mixture" if stack == "experts" else "removed"
        axis.set_xlabel(f"{what}, not trained (± standard error)" if scanned_any else "removed, then trained briefly")
    if groups:
        _draw_groups(figure, axes[1], by_stack, groups, baseline["groups"], scanned_any, floor)
    if scanned_any and trained_any:
        mark = Line2D([], [], marker="D", linestyle="", markersize=5, color="white", markeredgecolor=INK)
        axes[0][-1].legend([mark], ["after a brief training"], frameon=False, fontsize=8, loc="lower right",
                           bbox_to_anchor=(1, 1), borderaxespad=0.2)  # fmt: skip
    of = f"the baseline's ({baseline['token_acc']:.3f})"
    if ranking.get("gate") == "worst":
        of = f"the baseline's, of the worst {ranking['by']}"
    axes[0][0].set_ylabel(f"{_token_acc(ranking)}\nshare of {of}", linespacing=1.4)
    save_figure(figure, path)


def _behind(removal: dict[str, Any], ranking: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scanned scores that a removal's bar is of, and the baseline's."""
    whole = ranking["baseline"]
    if ranking.get("gate") != "worst":
        return removal, whole
    shares = {name: group["relative_scanned"] for name, group in removal["groups"].items()}
    worst = min(shares, key=lambda name: math.inf if shares[name] is None else shares[name])
    return removal["groups"][worst], whole["groups"][worst]


def _draw_groups(figure, axes, by_stack, groups: list[str], whole: dict[str, Any], scanned: bool, floor: float) -> None:
    """What each removal (columns, as the bars above) leaves of each group of rows, the darker the less."""
    import matplotlib
    import numpy as np

    colours = matplotlib.colormaps["OrRd_r"].with_extremes(bad=GRID)
    key = "relative_scanned" if scanned else "relative_trained"
    for axis, removals in zip(axes, by_stack):
        shares = [[removal["groups"].get(group, {}).get(key) for removal in removals] for group in groups]
        image = axis.imshow(
            np.array(shares, float), cmap=colours, vmin=floor, vmax=1, aspect="auto", interpolation="nearest"
        )
        for place, row in enumerate(shares if len(removals) <= 16 else ()):
            for position, share in enumerate(row):
                if share is not None:
                    ink = "white" if share < floor + 0.4 * (1 - floor) else INK
                    axis.text(position, place, f"{share * 100:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlim(-0.6, len(removals) - 0.4)
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks(range(len(groups)), [f"{group} ({whole[group]['token_acc']:.3f})" for group in groups])
    axes[0].tick_params(length=0)
    figure.colorbar(image, ax=axes[-1], label="share of its own", format=lambda value, _: f"{value:.0%}", aspect=8)


def draw_greedy(ranking: dict[str, Any], path: Path) -> None:
    """Quality against the parameters kept along the greedy path; what went at each point stands above it.

    A thin line is a group of rows'.
    """
    greedy, baseline = ranking["greedy"], ranking["baseline"]
    points = [point for point in greedy["path"] if point["token_acc"] is not None]
    width = max(6.0, 1.4 + 0.2 * len(points))
    figure, axes = new_figure(1, width, 4.2)
    axis = axes[0][0]
    kept = [point["parameters_share"] for point in points]
    axis.plot(
        kept, [point["token_acc"] for point in points], color=LINES[0], marker="o", markersize=4, label="token_acc"
    )  # fmt: skip
    groups = sorted(points[0].get("groups", {}))
    for colour, group in zip(itertools.cycle(COOL[2:]), groups):
        axis.plot(
            kept, [point["groups"][group]["token_acc"] for point in points], color=colour, linewidth=0.9, label=group
        )  # fmt: skip
    generated = [point for point in points if (point["generation"] or {}).get("exact_match") is not None]
    if generated:
        axis.plot(
            [point["parameters_share"] for point in generated],
            [point["generation"]["exact_match"] for point in generated],
            color=LINES[2], marker="s", markersize=3.5, label="exact match of generated answers",
        )  # fmt: skip
    if greedy["bend"] is not None:
        bend = greedy["path"][greedy["bend"]]
        axis.plot(
            bend["parameters_share"], bend["token_acc"], linestyle="", marker="o", markersize=12,
            markerfacecolor="none", markeredgecolor=KEY, markeredgewidth=1.6,
            label=f"the bend: {len(bend['removed'])} removed, {bend['parameters_share']:.1%} kept",
        )  # fmt: skip
    for share in (0.95, 0.90):
        axis.axhline(share * baseline["token_acc"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(
            f"{share:.0%}", (1, share * baseline["token_acc"]), xycoords=("axes fraction", "data"),
            xytext=(2, 0), textcoords="offset points", fontsize=7, color=MUTED, va="center",
        )  # fmt: skip

    span = (kept[0] - kept[-1]) or 0.01
    axis.set_xlim(kept[0] + 0.03 * span, kept[-1] - 0.03 * span)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -0.02), high)
    # Names stand in a row above, moved apart where points are close (vision blocks are small), a thin line from each.
    apart = 0.16 / (width - 1.2) * 1.06 * span
    places: list[float] = []
    for share in kept[1:]:
        places.append(min(share, places[-1] - apart) if places else share)
    places = [max(place, kept[-1] + apart * left) for left, place in enumerate(reversed(places))][::-1]
    for before, point, place in zip(points, points[1:], places):
        gone = "+".join(name for name in point["removed"] if name not in before["removed"])
        axis.annotate(
            gone, (point["parameters_share"], point["token_acc"]), xytext=(place, 1.03),
            textcoords=axis.get_xaxis_transform(), rotation=90, ha="center", va="bottom", fontsize=7,
            color=INK, annotation_clip=False, arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.8},
        )  # fmt: skip
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if span > 0.05 else f"{value:.1%}")
    how = "healed after each removal" if greedy["healed"] else "not trained"
    axis.set_xlabel(f"parameters kept, {how}; above: what goes at each point")
    axis.set_ylabel(_token_acc(ranking))
    axis.legend(edgecolor="none", fontsize=8, loc="lower left", ncols=1 + len(groups) // 4)
    save_figure(figure, path)


def draw_knockout_curves(ranking: dict[str, Any], path: Path) -> None:
    """Training and evaluation loss of the trained knockouts: a key layer's spikes at the start. Diverged ones show.

    The key layers (below 90% of the baseline) have colours of their own, at most eight of them, worst first; with more
    than ten runs in all, the others are one grey.
    """
    trained = [entry for entry in ranking["removals"] if entry["trained"] and entry["trained"]["curve"]]
    trained.sort(key=lambda entry: (entry["relative_trained"] is None, entry["relative_trained"] or 0))
    key = [entry for entry in trained if entry["relative_trained"] is not None and entry["relative_trained"] < 0.90][:8]
    others = [entry for entry in trained if entry not in key]
    many = len(trained) >= 10
    runs = [*zip(key, WARM), *zip(others, [PALE] * len(others) if many else COOL)]
    lines = []
    for entry, colour in runs:
        share = entry["relative_trained"]
        lines.append((entry["trained"], colour, entry["name"] + (f" ({share:.1%})" if share is not None else "")))
    baseline = ranking["baseline"]["trained"]
    if baseline and baseline["curve"]:
        lines.append((baseline, INK, "baseline"))

    figure, axes = new_figure(2, 10.2, 3.6)
    handles: dict[str, Any] = {}
    for axis, curve, title in zip(axes[0], ("training", "curve"), ("training loss", "evaluation loss")):
        for record, colour, label in lines:
            points = [(p["step"], p["loss"]) for p in record[curve] if p["loss"] is not None]
            pale, base = colour == PALE, colour == INK
            (line,) = axis.plot(
                [step for step, _ in points], [loss for _, loss in points], color=colour,
                linewidth=1.0 if pale else 1.6, linestyle="--" if base else "-", zorder=1.5 if pale else 2 + base,
                marker="o" if len(points) < 12 and not pale else None, markersize=3,
            )  # fmt: skip
            handles.setdefault(f"{len(others)} others" if pale else label, line)
        axis.set_xlim(left=0)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right upper")
    save_figure(figure, path)

"""A drawing of a model beside its base: every layer kept, healed or gone; heads, neurons and experts as bars."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.checkpoint.lineage import StackWay

from .style import COOL, FREE, INK, LINES, MUTED, PALE, WARM, new_figure, save_figure

WIDTH, HEIGHT, GAP = 0.84, 1.0, 0.75  # of a layer, where its neighbour begins 1 further on; between the stacks
COLOURS = {
    "heads": LINES[0], "KV heads": LINES[1], "neurons": "#e9a23b", "experts": WARM[2], "blocks": COOL[7],
    "tokens": COOL[4],
}  # fmt: skip
TAP = LINES[3]


@dataclass(frozen=True)
class Anatomy:
    title: str
    stacks: dict[str, StackWay]
    bars: dict[str, list[tuple[str, int, int]]]  # by stack: (what, in the base, in the model), of every layer alike
    taps: list[tuple[int, int | None]] = field(default_factory=list)  # as in a Lineage
    notes: list[str] = field(default_factory=list)  # what a picture of shapes can't show
    tokens: tuple[int, int] | None = None  # of the vocabulary, in the base and in the model: shown where they differ


def draw_anatomy(anatomy: Anatomy, path: Path) -> None:
    """Vision blocks above, text layers below, the base's from left to right."""
    rows = [stack for stack in ("vision", "text") if stack in anatomy.stacks]
    widest = max(anatomy.stacks[stack].count for stack in rows)
    height = len(rows) * (HEIGHT + GAP)
    scale = min(0.62, 17 / widest)  # inches a layer
    figure, axes = new_figure(1, max(7.5, 1.9 + scale * widest), 1.5 + 1.25 * height)
    axis = axes[0][0]
    bottoms: dict[str, float] = {stack: (len(rows) - 1 - row) * (HEIGHT + GAP) for row, stack in enumerate(rows)}
    for stack in rows:
        _draw_stack(axis, anatomy.stacks[stack], anatomy.bars[stack], bottoms[stack], 8 if widest <= 40 else 6)
        _name_stack(axis, stack, anatomy.stacks[stack], bottoms[stack])
    if anatomy.taps:
        _draw_taps(axis, anatomy, bottoms)
    cut_tokens = anatomy.tokens is not None and anatomy.tokens[0] != anatomy.tokens[1]
    if cut_tokens:
        _draw_tokens(axis, anatomy, bottoms["text"])
    axis.set_xlim(-2.2 - 0.01 * widest, widest + 0.1 + 1.6 * cut_tokens)
    notes = "; ".join(anatomy.notes)
    axis.set_ylim(-0.55 if notes else -0.3, height - GAP + 0.15)
    axis.text(0, -0.42, notes, va="center", fontsize=8, color=MUTED)
    axis.set_axis_off()
    axis.set_title(anatomy.title, fontsize=11, pad=10)
    _explain(figure, anatomy)
    save_figure(figure, path)


def _name_stack(axis, stack: str, way: StackWay, bottom: float) -> None:
    unit = "blocks" if stack == "vision" else "layers"
    count = f"{way.count} {unit}" if not way.gone else f"{way.count} to {len(way.kept)} {unit}"
    axis.text(-0.25, bottom + 0.58, stack, ha="right", va="center", fontsize=10, fontweight="bold", color=INK)
    axis.text(-0.25, bottom + 0.34, count, ha="right", va="center", fontsize=8, color=MUTED)


def _draw_stack(axis, way: StackWay, bars: list[tuple[str, int, int]], bottom: float, size: int) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    round_corners = "round,pad=0,rounding_size=0.07"
    for layer in range(way.count):
        place = (layer, bottom)
        if layer in way.gone:
            axis.add_patch(
                FancyBboxPatch(place, WIDTH, HEIGHT, boxstyle=round_corners, fill=False, edgecolor=MUTED,
                               linewidth=1, linestyle=(0, (3, 2)))
            )  # fmt: skip
            axis.text(layer + WIDTH / 2, bottom + 0.8, f"stage {way.gone[layer]}" if size > 6 else way.gone[layer],
                      ha="center", va="center", fontsize=size - 2.5, color=MUTED)  # fmt: skip
        else:
            healed = layer in way.healed
            axis.add_patch(
                FancyBboxPatch(place, WIDTH, HEIGHT, boxstyle=round_corners, facecolor="white",
                               edgecolor=FREE if healed else PALE, linewidth=2.2 if healed else 1)
            )  # fmt: skip
            slot = (WIDTH - 0.12) / len(bars)
            for number, (what, before, after) in enumerate(bars):
                corner = (layer + 0.06 + (number + 0.1) * slot, bottom + 0.07)
                for share, alpha in ((1.0, 0.15), (after / before, 1.0)):
                    size_of_bar = (0.8 * slot, (HEIGHT - 0.14) * share)
                    axis.add_patch(Rectangle(corner, *size_of_bar, color=COLOURS[what], alpha=alpha, linewidth=0))
        axis.text(layer + WIDTH / 2, bottom - 0.13, layer, ha="center", va="center", fontsize=size,
                  color=PALE if layer in way.gone else INK)  # fmt: skip
    for left, right in _gaps(way):
        healed = way.healed.get(left, 0) >= max(way.gone[layer] for layer in range(left + 1, right))
        axis.plot([left + WIDTH, right], [bottom + HEIGHT / 2] * 2, zorder=3,
                  color=FREE if healed else MUTED, linewidth=2.6 if healed else 1.2)  # fmt: skip


def _gaps(way: StackWay) -> list[tuple[int, int]]:
    """(kept layer before removed ones, kept one behind them); -1 and the count where there is none."""
    edges = [-1, *way.kept, way.count]
    return [(a, b) for a, b in zip(edges, edges[1:]) if b - a > 1]


def _draw_tokens(axis, anatomy: Anatomy, bottom: float) -> None:
    """The vocabulary behind the text layers, as far filled as tokens are left."""
    from matplotlib.patches import Rectangle

    before, after = anatomy.tokens or (1, 1)
    left = anatomy.stacks["text"].count + 0.35
    for share, alpha in ((1.0, 0.15), (after / before, 1.0)):
        axis.add_patch(
            Rectangle((left, bottom), 0.5, HEIGHT * share, color=COLOURS["tokens"], alpha=alpha, linewidth=0)
        )
    axis.text(left + 0.25, bottom - 0.13, "tokens", ha="center", va="center", fontsize=8, color=INK)


def _draw_taps(axis, anatomy: Anatomy, bottoms: dict[str, float]) -> None:
    """An arrow from each tapped block to the text layer that its features enter: the n-th that is left."""
    text, top, start = anatomy.stacks["text"].kept, bottoms["text"] + HEIGHT, bottoms["vision"]
    entered = iter(text)
    for was, now in anatomy.taps:
        if now is None:
            end = start - 0.42
            axis.plot([was + WIDTH / 2] * 2, [start - 0.22, end], color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
            axis.plot(was + WIDTH / 2, end - 0.02, marker="x", markersize=6, color=MUTED, markeredgewidth=1.5)
            continue
        axis.annotate(
            "", (next(entered) + WIDTH / 2, top + 0.02), (now + WIDTH / 2, start - 0.2),
            arrowprops={"arrowstyle": "-|>", "color": TAP, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0,
                        "connectionstyle": "arc3,rad=0.0"},
        )  # fmt: skip


def _explain(figure, anatomy: Anatomy) -> None:
    """The legend: what is there, and what the bars say."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for stack in anatomy.bars:
        for what, before, after in anatomy.bars[stack] if stack == "text" else ():
            label = f"{what}: {before:,}" + (f" to {after:,}" if after != before else "")
            handles.append(Patch(color=COLOURS[what], label=label))
    if anatomy.tokens and anatomy.tokens[0] != anatomy.tokens[1]:
        label = "tokens of the vocabulary: {:,} to {:,}".format(*anatomy.tokens)
        handles.append(Patch(color=COLOURS["tokens"], label=label))
    ways = anatomy.stacks.values()
    if any(way.gone for way in ways):
        handles.append(Patch(fill=False, edgecolor=MUTED, linestyle=(0, (3, 2)), label="gone"))
    if any(way.healed for way in ways):
        handles.append(Patch(fill=False, edgecolor=FREE, linewidth=2.2, label="refitted around a seam"))
    if any(now is not None for _, now in anatomy.taps):
        handles.append(Line2D([], [], color=TAP, marker=">", markersize=5, label="DeepStack"))
    if any(now is None for _, now in anatomy.taps):
        handles.append(Line2D([], [], color=MUTED, marker="x", linestyle=(0, (2, 2)), label="its merger dropped"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=8)

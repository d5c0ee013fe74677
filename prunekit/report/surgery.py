"""Pictures of what cuts took: heads, and zeros by layer."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError

from .style import COOL, KEY, WARM, new_figure, save_figure


def draw_heads(entry: dict[str, Any], path: Path) -> None:
    """How much each head of each layer matters, as a share of its layer's best, and which of them went.

    `entry` is width_cut's in a history, with its `head_scores` and `heads_removed`, of all layers or of `head_layers`.
    """
    scores = [[value / (max(row) or 1.0) for value in row] for row in entry["head_scores"]]
    layers, count = len(scores), len(scores[0])
    figure, axes = new_figure(1, 2.4 + 0.22 * count, 1.4 + 0.16 * layers)
    axis = axes[0][0]
    image = axis.imshow(scores, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    gone = [(head, layer) for layer, removed in enumerate(entry["heads_removed"]) for head in removed]
    axis.scatter(
        [head for head, _ in gone], [layer for _, layer in gone], marker="x", s=18, color=KEY, linewidth=1.2
    )  # fmt: skip
    axis.grid(visible=False)
    axis.set_xticks(range(0, count, math.ceil(count / 16)))
    numbers = entry.get("head_layers") or range(layers)
    shown = range(0, layers, math.ceil(layers / 20))
    axis.set_yticks(shown, [str(numbers[row]) for row in shown])
    axis.set_xlabel("head, × removed")
    axis.set_ylabel("layer")
    axis.set_title(f"heads by {entry['settings']['score']}")
    figure.colorbar(image, label="share of the layer's best", format=lambda value, _: f"{value:.0%}")
    save_figure(figure, path)


def draw_sparsity(tensors: dict[str, float], path: Path) -> None:
    """Share of zeros by layer, a line for each kind of projection, a panel for each stack; tensors as in the history.

    Experts of one layer count together.
    """
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, share in tensors.items():
        if match := re.match(r"(.*?)\.(\d+)\.(.*?)(?:\.weight)?$", name):
            kind = re.sub(r"\.\d+\.", ".", match[3])
            panels.setdefault(match[1], {}).setdefault(kind, {}).setdefault(int(match[2]), []).append(share)
    if not panels:
        raise PruneKitError("no layer has a record of sparsity to draw")
    figure, axes = new_figure(len(panels), 1.6 + 4.2 * len(panels), 3.4)
    for axis, (stack, kinds) in zip(axes[0], panels.items()):
        for colour, (kind, layers) in zip(itertools.cycle(COOL + WARM), kinds.items()):
            means = [sum(layers[layer]) / len(layers[layer]) for layer in sorted(layers)]
            axis.plot(sorted(layers), means, marker="o", markersize=3, linewidth=1.3, color=colour, label=kind)
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_title(f"zeros, {stack}")
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=7, ncols=2)
    save_figure(figure, path)

"""Pictures of the values of weights, layer by layer: as they are, and what became zero of them.

Every tensor is read by itself, so that no model is ever in memory.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import NAME_PREFIX, spot_of
from prunekit.surgery.zeros_weights import Weight, choose_weights

from .style import COOL, INK, KEY, MUTED, PALE, new_figure, save_figure

BINS = 121  # an odd number, so that one of them is around 0
REACH = 3.0  # standard deviations of a column's widest layer that are drawn to either side


@dataclass
class Part:
    """The weights of one layer's attention or MLP, counted by value."""

    before: Any = 0  # (BINS,), of weights that aren't zero
    after: Any = 0
    weights: int = 0
    weights_after: int = 0
    zeros: int = 0
    zeros_after: int = 0
    squares: float = 0.0  # their sum
    # Of each tensor: the largest magnitude that became zero, and the smallest that did not
    gone: list[tuple[float, float]] = field(default_factory=list)

    @property
    def thresholds(self) -> list[float]:
        """Magnitudes below which a tensor's weights became zero; none where something else than size chose them."""
        apart = all(largest <= smallest for largest, smallest in self.gone)
        return [largest for largest, _ in self.gone] if apart else []


# By stack and part (its title), then by layer
Distributions = dict[str, dict[int, Part]]


@dataclass(frozen=True)
class Distribution:
    """What `draw_distributions` draws: counts of values between -reach and reach of each column."""

    columns: Distributions
    reach: dict[str, float]
    compared: bool  # whether there is an after


def _places(checkpoint: Checkpoint, weights: dict[str, Weight]) -> Iterator[tuple[str, str, int]]:
    """(name, column, layer) of the layers' weights."""
    for name, weight in weights.items():
        if weight.stack is not None and weight.layer is not None:
            row = checkpoint.family.stacks[weight.stack]
            found = row.within(name)
            inside = (*row.mlp, f"{row.mlp[-1].rpartition('.')[0]}.gate_up_proj")  # the last: stacked experts'
            part = "MLP" if found and spot_of(found[1]).name in inside else "attention"
            yield name, f"{weight.stack}, {part}", weight.layer


def weight_distributions(
    before: Checkpoint,
    after: Checkpoint | None = None,
    modules: str | None = None,
    read: Callable[[str], Any] | None = None,
) -> Distribution:
    """Count the values of the layers' projections (or of those that `modules`, a regex, finds), and what they became.

    after: a checkpoint with the same layers, of any widths; `read(name)` gives its values if they aren't in its files.
    Reads each tensor of `before` twice. Raises PruneKitError if nothing matches, if the two are of different families
    or numbers of layers, or for values that aren't finite.
    """
    import torch

    columns: Distributions = {}
    places = list(_places(before, choose_weights(before, modules)))
    if not places:
        raise PruneKitError(f"--modules {(modules or '')[:80]!r}: matches no weight of a layer")
    for name, column, layer in tqdm(places, desc="measure", leave=False, disable=None):
        values = before.read(name)
        part = columns.setdefault(column, {}).setdefault(layer, Part())
        part.squares += float(values.float().square().sum(dtype=torch.float64))
        part.weights += values.numel()
        if not part.squares < float("inf"):
            raise PruneKitError(f"{before.path}: {name} holds values that aren't finite; make or download it again")
    reach = {
        column: REACH * max((part.squares / part.weights) ** 0.5 for part in parts.values()) or 1.0
        for column, parts in columns.items()
    }

    def count(values, column: str):
        flat = values.float().flatten()
        return torch.histc(flat[flat != 0], BINS, -reach[column], reach[column]).numpy()

    twins = _twins(before, after, modules, places) if after else {}
    for name, column, layer in tqdm(places, desc="count", leave=False, disable=None):
        values, part = before.read(name), columns[column][layer]
        part.before = part.before + count(values, column)
        part.zeros += int((values == 0).sum())
        if not after:
            continue
        for twin in twins[name]:
            new = (read or after.read)(twin)
            part.after = part.after + count(new, column)
            part.weights_after += new.numel()
            part.zeros_after += int((new == 0).sum())
            if new.shape == values.shape and bool((went := (new == 0) & (values != 0)).any()):
                stays = values[new != 0].abs()
                smallest = float(stays.min()) if len(stays) else float("inf")
                part.gone.append((float(values[went].abs().max()), smallest))
    in_order = sorted(columns, key=str.lower)  # attention before MLP
    return Distribution({column: columns[column] for column in in_order}, reach, after is not None)


def _twins(before: Checkpoint, after: Checkpoint, modules: str | None, places) -> dict[str, list[str]]:
    """The tensors of `after` by those of `before`; what has no twin of its name (experts) goes to its layer's first."""
    if before.family != after.family:
        raise PruneKitError(
            f"{after.path} is {after.family.model_type}, {before.path} {before.family.model_type}: "
            "give two models of one family"
        )
    theirs = list(_places(after, choose_weights(after, modules)))
    ours: dict[str, list[str]] = {name: [] for name, _, _ in places}
    plain = {re.sub(NAME_PREFIX, "", name): name for name in ours}
    first = {(column, layer): name for name, column, layer in reversed(places)}
    if {place[1:] for place in theirs} != first.keys():
        raise PruneKitError(f"{after.path} has other layers than {before.path}: give models of the same layers")
    for name, *place in theirs:
        ours[plain.get(re.sub(NAME_PREFIX, "", name)) or first[place[0], place[1]]].append(name)
    return ours


def draw_distributions(found: Distribution, path: Path) -> None:
    """A row for each layer, a column for each part: how its weights lie around 0, before and after.

    Areas are shares of all weights, zeros left out, each row scaled to its peak; beside it stands the share of zeros.
    """
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers = max(len(parts) for parts in found.columns.values())
    figure, axes = new_figure(len(found.columns), 0.8 + 3.4 * len(found.columns), 1.5 + 0.3 * layers)
    colour, cut = COOL[0], False
    for axis, (column, parts) in zip(axes[0], found.columns.items()):
        reach = found.reach[column]
        places = np.linspace(-reach, reach, BINS)
        for row, layer in enumerate(sorted(parts)):
            part, floor = parts[layer], -row
            before = part.before / part.weights
            after = part.after / part.weights_after if found.compared else before
            scale = 1.25 / max(before.max(), after.max(), 1e-12)
            axis.fill_between(
                places, floor, floor + after * scale, step="mid", color=colour, alpha=0.85, linewidth=0, zorder=2 * row
            )
            if found.compared:
                axis.step(places, floor + before * scale, where="mid", color=INK, linewidth=0.6, zorder=2 * row + 1)
            for level in {min(part.thresholds), max(part.thresholds)} if part.thresholds else ():
                axis.vlines([-level, level], floor, floor + 0.75, color=KEY, linewidth=1.1, zorder=2 * row + 1)
                cut = True
            zeros = part.zeros_after / part.weights_after if found.compared else part.zeros / part.weights
            if zeros:
                text = f"{zeros:.1%}"
                axis.text(1.01, floor, text, transform=axis.get_yaxis_transform(), fontsize=7, color=MUTED)
        axis.set_xlim(-reach, reach)
        axis.set_ylim(-len(parts) + 0.85, 1.35)
        axis.set_yticks([-row for row in range(len(parts))], [str(layer) for layer in sorted(parts)], fontsize=7)
        axis.grid(visible=False)
        axis.axvline(0, color=PALE, linewidth=0.6, zorder=-1)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(column)
        axis.set_xlabel("weight")
    axes[0][0].set_ylabel("layer")
    handles: list[Any] = [Patch(color=colour, alpha=0.85, label="after" if found.compared else "weights")]
    if found.compared:
        handles.insert(0, Line2D([], [], color=INK, linewidth=0.8, label="before"))
    if cut:
        handles.append(Line2D([], [], color=KEY, linewidth=1.1, label="threshold"))
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8,
        title="at the right: zeros", title_fontsize=7,
    )  # fmt: skip
    save_figure(figure, path)

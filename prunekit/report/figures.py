"""Pictures of what happened: knockout rankings, training curves, the way of a model through its stages.

    python -m prunekit.report checkpoints/recovered

For a folder with logging.jsonl this draws curves.png beside it, where its history tells of zeros sparsity.png, and where
they became more in training quality.png. Everything is drawn from ranking.json,
logging.jsonl and pruning_info.json, never from printed logs.
"""

import itertools
import math
import re
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import history, read_json
from prunekit.errors import PruneKitError, run_script
from prunekit.rules import REAL, TEXT, Items, Keys, Rule, check
from prunekit.training.publish import read_log

INK, MUTED, GRID = "#222222", "#6b7280", "#e5e7eb"
FREE, RECOVERS, KEY = "#2a9d8f", "#e9a23b", "#c8553d"  # over 95%, over 90%, below
WARM = ("#c8553d", "#e9a23b", "#b5446e", "#8c2f1b", "#d98880", "#a67c1a", "#7a3b69", "#f08a5d")
COOL = (
    "#2f6fb0",
    "#2a9d8f",
    "#8a5fb0",
    "#6aaed6",
    "#57803a",
    "#26547c",
    "#7fc8b8",
    "#9a9ad1",
    "#4d6a8a",
    "#a3c585",
)
PALE = "#c5cad3"
LINES = ("#2f6fb0", "#c8553d", "#2a9d8f", "#8a5fb0")


def _figure(columns: int, width: float, height: float, **layout: Any):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
            "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "axes.titleweight": "bold",
            "axes.titlelocation": "left", "axes.titlesize": 10,
        }
    )  # fmt: skip
    return plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained", gridspec_kw=layout)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    partial = path.with_name(f".{path.name}.new")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


def _colour(share: float) -> str:
    return FREE if share >= 0.95 else RECOVERS if share >= 0.90 else KEY


def _token_acc(ranking: dict[str, Any]) -> str:
    return f"token_acc, {'with' if ranking['counts_suffix'] else 'without'} the template's suffix"


def draw_ranking(ranking: dict[str, Any], path: Path) -> None:
    """What removing each layer leaves of the baseline's token_acc, a panel per stack, with lines at 95% and 90%.

    Bars are what the scan found, with its standard error, and diamonds what was left after the training; bars are
    trained values where there was no scan. What leaves less than 60% is a stub with its number.
    """
    from matplotlib.lines import Line2D

    stacks = sorted({removal["stack"] for removal in ranking["removals"]})
    by_stack = [
        sorted((r for r in ranking["removals"] if r["stack"] == stack), key=lambda r: r["layer"]) for stack in stacks
    ]
    widths = [max(3.6, 0.14 * len(removals)) for removals in by_stack]
    figure, axes = _figure(len(stacks), 1.5 + sum(widths), 3.6, width_ratios=widths)
    scanned_any = any(removal["relative_scanned"] is not None for removal in ranking["removals"])
    trained_any = any(removal["relative_trained"] is not None for removal in ranking["removals"])
    baseline = ranking["baseline"] if scanned_any else ranking["baseline"]["trained"]

    def values(removal: dict[str, Any]) -> tuple[float | None, float | None]:
        """Height of the bar, place of the diamond."""
        trained = removal["relative_trained"]
        return (removal["relative_scanned"], trained) if scanned_any else (trained, None)

    drawn = [value for removal in ranking["removals"] for value in values(removal) if value is not None]
    low, high = min(0.88, *drawn), max(1.0, *drawn)
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
                    position, top - floor, bottom=floor, color=_colour(bar), width=0.72,
                    hatch="" if bar > floor else "/////", edgecolor="white", linewidth=0,
                )  # fmt: skip
                error = (removal.get("standard_error") or {}).get("token_acc")
                if scanned_any and error and bar > floor:
                    error /= baseline["token_acc"]
                    axis.errorbar(position, bar, error, color=INK, linewidth=0.8)
                    top += error
            if diamond is not None:
                axis.plot(
                    position, max(diamond, stub), marker="D", markersize=5 if labelled else 4,
                    color=_colour(diamond), markeredgecolor=INK, markeredgewidth=0.8,
                )  # fmt: skip
                top = max(top, max(diamond, stub) + 0.025 * (1 - floor))
            lines = [f"{bar * 100:.1f}"] if bar is not None and (labelled or bar < floor) else []
            if diamond is not None and (labelled or diamond < floor):
                lines.append(f"◆{diamond * 100:.1f}")
            axis.annotate(
                "\n".join(reversed(lines)) if labelled else " ".join(lines),
                (position, top), xytext=(0, 1.5), textcoords="offset points",
                ha="center", va="bottom", fontsize=7 if labelled else 6, color=INK, rotation=0 if labelled else 90,
            )  # fmt: skip
        for line, label in ((0.95, "95%"), (0.90, "90%")):
            axis.axhline(line, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.annotate(
                label, (1, line), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
                fontsize=7, color=MUTED, va="center",
            )  # fmt: skip
        step = math.ceil(0.21 * len(removals) / width)
        axis.set_xticks(range(0, len(removals), step), [str(r["layer"]) for r in removals[::step]])
        axis.set_xlim(-0.6, len(removals) - 0.4)
        axis.set_ylim(floor, high + (high - floor) * 0.16)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(axis="x", visible=False)
        axis.set_title(f"{stack} {'layers' if stack == 'text' else 'blocks'}")
        axis.set_xlabel("removed, not trained (± standard error)" if scanned_any else "removed, then trained briefly")
    if scanned_any and trained_any:
        mark = Line2D([], [], marker="D", linestyle="", markersize=5, color="white", markeredgecolor=INK)
        axes[0][-1].legend([mark], ["after a brief training"], frameon=False, fontsize=8, loc="lower right",
                           bbox_to_anchor=(1, 1), borderaxespad=0.2)  # fmt: skip
    axes[0][0].set_ylabel(
        f"{_token_acc(ranking)}\nshare of the baseline's ({baseline['token_acc']:.3f})", linespacing=1.4
    )
    _save(figure, path)


def draw_greedy(ranking: dict[str, Any], path: Path) -> None:
    """Quality against the parameters kept along the greedy path; what went at each point stands above it."""
    greedy, baseline = ranking["greedy"], ranking["baseline"]
    points = [point for point in greedy["path"] if point["token_acc"] is not None]
    width = max(6.0, 1.4 + 0.2 * len(points))
    figure, axes = _figure(1, width, 4.2)
    axis = axes[0][0]
    kept = [point["parameters_share"] for point in points]
    axis.plot(
        kept, [point["token_acc"] for point in points], color=LINES[0], marker="o", markersize=4, label="token_acc"
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
    axis.legend(edgecolor="none", fontsize=8, loc="lower left")
    _save(figure, path)


def draw_knockout_curves(ranking: dict[str, Any], path: Path) -> None:
    """Training and evaluation loss of the trained knockouts: a key layer's spikes at the start. Diverged ones show, too.

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

    figure, axes = _figure(2, 10.2, 3.6)
    handles = {}
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
    _save(figure, path)


def _step(record: dict[str, Any]) -> int | None:
    """The step that a record is of; None where it says none."""
    match = re.match(r"(\d{1,15})(?:/|$)", str(record.get("global_step/max_steps")), re.ASCII)
    return int(match[1]) if match else None


def _series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; a resumed run logs steps again, and the last one counts."""
    points = {
        step: record[key] for record in log if REAL.holds(record.get(key)) and (step := _step(record)) is not None
    }
    return sorted(points), [points[step] for step in sorted(points)]


def draw_curves(folder: Path, path: Path) -> None:
    """Loss, and token_acc or reward, over the steps of a run. Raises PruneKitError if nothing was logged."""
    log = read_log(folder)
    panels = [
        ("loss", [("loss", "training"), ("eval_loss", "validation")]),
        ("token_acc", [("token_acc", "training"), ("eval_token_acc", "validation")]),
        ("reward", [("reward", "training"), ("eval_reward", "validation")]),
        ("F1", [("eval_f1", "validation")]),
    ]
    drawn = [(title, [(label, *_series(log, key)) for key, label in keys]) for title, keys in panels]
    drawn = [(title, [line for line in lines if line[1]]) for title, lines in drawn]
    drawn = [(title, lines) for title, lines in drawn if lines]
    if not drawn:
        raise PruneKitError(f"{folder}: logging.jsonl has no training records to draw")
    figure, axes = _figure(len(drawn), 0.6 + 3.6 * len(drawn), 3.0)
    for axis, (title, lines) in zip(axes[0], drawn):
        for colour, (label, steps, values) in zip(LINES, lines):
            few = len(steps) < 40
            axis.plot(
                steps,
                values,
                color=colour,
                linewidth=1.5,
                marker="o" if few else None,
                markersize=3,
                label=label,
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_stages(stages: list[dict[str, Any]], path: Path) -> None:
    """Size and quality of a model after each stage; rows as in the demo's summary.json."""
    figure, axes = _figure(2, 9.6, 3.6)
    names = [stage["stage"] for stage in stages]
    places = list(range(len(stages)))
    base = stages[0]
    for key, label, colour in (
        ("parameters", "parameters", LINES[0]),
        ("kv_bytes_per_token", "KV bytes per token", LINES[1]),
    ):
        axes[0][0].plot(
            places,
            [stage[key] / (base[key] or 1) for stage in stages],  # an encoder has no KV cache
            marker="o",
            markersize=4,
            color=colour,
            label=label,
        )
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
    _save(figure, path)


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
    figure, axes = _figure(len(panels), 1.6 + 4.2 * len(panels), 3.4)
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
    _save(figure, path)


def draw_quality(events: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Quality against sparsity: what each pruning cost, and what retraining gave back.

    Events have sparsity, and before, after and retrained: the metric, or scores with it. PruneKitError if none was measured.
    """

    def value(event: dict[str, Any], when: str) -> float | None:
        return event[when][metric] if isinstance(event.get(when), dict) else event.get(when)

    events = [e for e in events if None not in (value(e, "before"), value(e, "after"))]
    if not events:
        raise PruneKitError("no pruning was measured: there is no quality to draw")
    figure, axes = _figure(1, 5.4, 3.6)
    axis = axes[0][0]
    axis.axhline(value(events[0], "before"), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="dense")
    for event in events:
        if (retrained := value(event, "retrained")) is not None:
            heights = [value(event, "after"), retrained]
            axis.plot([event["sparsity"]] * 2, heights, color=PALE, linewidth=1.2, zorder=1)
    for colour, when, label in ((KEY, "after", "pruned"), (FREE, "retrained", "retrained")):
        known = [(e["sparsity"], value(e, when)) for e in events if value(e, when) is not None]
        axis.plot(*zip(*known), color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_xlabel("zeros")
    axis.set_title(metric)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


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

    figure, axes = _figure(1, 2.6 + 1.25 * len(models), 1.0 + 0.27 * len(names))
    axis = axes[0][0]
    for column, (_, scores) in enumerate(models):
        for place, name in enumerate(names):
            value, base = f1(scores, name), f1(first, name)
            colour = PALE if not column else _colour(value / base if base else 1.0)
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
    _save(figure, path)


def draw_heads(entry: dict[str, Any], path: Path) -> None:
    """How much each head of each layer matters, as a share of its layer's best, and which of them went.

    `entry` is width_cut's in a history, with its `head_scores` and `heads_removed`.
    """
    scores = [[value / (max(row) or 1.0) for value in row] for row in entry["head_scores"]]
    layers, count = len(scores), len(scores[0])
    figure, axes = _figure(1, 2.4 + 0.22 * count, 1.4 + 0.16 * layers)
    axis = axes[0][0]
    image = axis.imshow(scores, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    gone = [(head, layer) for layer, removed in enumerate(entry["heads_removed"]) for head in removed]
    axis.scatter(
        [head for head, _ in gone], [layer for _, layer in gone], marker="x", s=18, color=KEY, linewidth=1.2
    )  # fmt: skip
    axis.grid(visible=False)
    axis.set_xticks(range(0, count, math.ceil(count / 16)))
    axis.set_yticks(range(0, layers, math.ceil(layers / 20)))
    axis.set_xlabel("head, × removed")
    axis.set_ylabel("layer")
    axis.set_title(f"heads by {entry['settings']['score']}")
    figure.colorbar(image, label="share of the layer's best", format=lambda value, _: f"{value:.0%}")
    _save(figure, path)


def _record_of_sparsity(found: Any) -> Keys:
    """What sparsity.json must be: its metric's name, and events with values of it."""
    metric = found.get("metric") if isinstance(found, dict) else None
    score = Rule(
        f"a number, or scores with {metric}",
        lambda value: REAL.holds(value.get(metric) if isinstance(value, dict) else value),
    )
    event = Keys({"sparsity": REAL} | dict.fromkeys(("before", "after", "retrained"), score), ("sparsity",))
    return Keys({"metric": TEXT, "events": Items(event)}, ("metric", "events"))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint or run folder")
    folder = parser.parse_args().folder
    records = [entry["sparsity"]["tensors"] for entry in history(folder) if entry.get("sparsity")]
    drawn = 0
    if (folder / "logging.jsonl").is_file():
        draw_curves(folder, folder / "curves.png")
        drawn += 1
    if records:
        draw_sparsity(records[-1], folder / "sparsity.png")
        drawn += 1
    if (folder / "sparsity.json").is_file():
        found = read_json(folder / "sparsity.json")
        check(found, _record_of_sparsity(found), folder / "sparsity.json")
        if any(event.get("after") is not None for event in found["events"]):
            draw_quality(found["events"], found["metric"], folder / "quality.png")
            drawn += 1
    if not drawn:
        raise PruneKitError(f"{folder} has neither logging.jsonl nor a record of sparsity: give the folder of a stage")


if __name__ == "__main__":
    run_script(main)

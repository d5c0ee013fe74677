"""Pictures of what happened: knockout rankings, training curves, the way of a model through its stages.

    python -m prunekit.report checkpoints/recovered

For a folder with logging.jsonl this draws curves.png beside it. Everything is drawn from ranking.json,
logging.jsonl and pruning_info.json, never from printed logs.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from .errors import PruneKitError, run_script
from .publish import read_log

INK, MUTED, GRID = "#222222", "#6b7280", "#e5e7eb"
FREE, RECOVERS, KEY = "#2a9d8f", "#e9a23b", "#c8553d"  # over 95%, over 90%, below
LINES = ("#2f6fb0", "#c8553d", "#2a9d8f", "#8a5fb0")


def _figure(columns: int, width: float, height: float):
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
    return plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    partial = path.with_name(f".{path.name}.new")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


def draw_ranking(ranking: dict[str, Any], path: Path) -> None:
    """Bars of token_acc relative to the baseline, a panel per stack, with lines at 95% and 90%."""
    stacks = sorted({removal["stack"] for removal in ranking["removals"]})
    figure, axes = _figure(len(stacks), 1.5 + 3.6 * len(stacks), 3.4)
    baseline = ranking["baseline"]["token_acc"]
    values = [removal["relative"] for removal in ranking["removals"] if removal["relative"] is not None]
    low = min([0.88, *values])
    floor = math.floor((low - 0.02) * 20) / 20 if low > 0.7 else 0.0
    for axis, stack in zip(axes[0], stacks):
        removals = sorted((r for r in ranking["removals"] if r["stack"] == stack), key=lambda r: r["layer"])
        for position, removal in enumerate(removals):
            share = removal["relative"]
            if share is None:
                axis.text(
                    position, floor, "failed", rotation=90, ha="center", va="bottom", color=KEY, fontsize=8
                )
                continue
            colour = FREE if share >= 0.95 else RECOVERS if share >= 0.90 else KEY
            axis.bar(position, share - floor, bottom=floor, color=colour, width=0.72)
            if len(removals) <= 16:
                axis.text(
                    position, share, f"{share * 100:.1f}", ha="center", va="bottom", fontsize=7, color=INK
                )
        for line, label in ((0.95, "95%"), (0.90, "90%")):
            axis.axhline(line, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.text(len(removals) - 0.45, line, label, fontsize=7, color=MUTED, va="center", ha="left")
        step = max(1, math.ceil(len(removals) / 16))
        axis.set_xticks(range(0, len(removals), step), [str(r["layer"]) for r in removals[::step]])
        axis.set_xlim(-0.6, len(removals) - 0.4)
        axis.set_ylim(floor, 1.0 + (1.0 - floor) * 0.08)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(axis="x", visible=False)
        axis.set_title(f"{stack} {'layers' if stack == 'text' else 'blocks'}")
        axis.set_xlabel("removed, then trained briefly")
    axes[0][0].set_ylabel(f"token_acc, share of baseline ({baseline:.3f})")
    _save(figure, path)


def _step(record: dict[str, Any]) -> int:
    return int(str(record["global_step/max_steps"]).split("/")[0])


def _series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; a resumed run logs steps again, and the last one counts."""
    points = {
        _step(record): record[key]
        for record in log
        if "global_step/max_steps" in record and isinstance(record.get(key), int | float)
    }
    return sorted(points), [points[step] for step in sorted(points)]


def draw_curves(folder: Path, path: Path) -> None:
    """Loss, and token_acc or reward, over the steps of a run. Raises PruneKitError if nothing was logged."""
    log = read_log(folder)
    panels = [
        ("loss", [("loss", "training"), ("eval_loss", "validation")]),
        ("token_acc", [("token_acc", "training"), ("eval_token_acc", "validation")]),
        ("reward", [("reward", "training"), ("eval_reward", "validation")]),
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
            [stage[key] / base[key] for stage in stages],
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint or run folder with logging.jsonl")
    folder = parser.parse_args().folder
    if not (folder / "logging.jsonl").is_file():
        raise PruneKitError(f"{folder} has no logging.jsonl: give the folder of a training stage")
    draw_curves(folder, folder / "curves.png")


if __name__ == "__main__":
    run_script(main)

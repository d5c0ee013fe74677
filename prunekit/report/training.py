"""Pictures of a training: its curves, and what prunings within it cost."""

import re
from pathlib import Path
from typing import Any

from prunekit.checkpoint.records import LOG
from prunekit.checkpoint.training_run import read_log
from prunekit.errors import PruneKitError
from prunekit.rules import REAL

from .style import FREE, KEY, LINES, MUTED, PALE, new_figure, save_figure


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
        ("perplexity", [("eval_perplexity", "validation")]),
        ("token_acc", [("token_acc", "training"), ("eval_token_acc", "validation")]),
        ("reward", [("reward", "training"), ("eval_reward", "validation")]),
        ("F1", [("eval_f1", "validation")]),
    ]
    drawn = [(title, [(label, *_series(log, key)) for key, label in keys]) for title, keys in panels]
    drawn = [(title, [line for line in lines if line[1]]) for title, lines in drawn]
    drawn = [(title, lines) for title, lines in drawn if lines]
    if not drawn:
        raise PruneKitError(f"{folder}: {LOG} has no training records to draw")
    figure, axes = new_figure(len(drawn), 0.6 + 3.6 * len(drawn), 3.0)
    for axis, (title, lines) in zip(axes[0], drawn):
        for colour, (label, steps, values) in zip(LINES, lines):
            few = len(steps) < 40
            axis.plot(
                steps, values, color=colour, linewidth=1.5, marker="o" if few else None, markersize=3, label=label
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_quality(events: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Quality against sparsity: what each pruning cost, and what retraining gave back.

    Events have sparsity, and before, after and retrained: the metric, or scores with it. PruneKitError if none was
    measured.
    """

    def value(event: dict[str, Any], when: str) -> float | None:
        return event[when][metric] if isinstance(event.get(when), dict) else event.get(when)

    events = [e for e in events if None not in (value(e, "before"), value(e, "after"))]
    if not events:
        raise PruneKitError("no pruning was measured: there is no quality to draw")
    figure, axes = new_figure(1, 5.4, 3.6)
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
    save_figure(figure, path)

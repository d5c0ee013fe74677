"""Pictures of what happened: knockout rankings, training curves, the way of a model through its stages.

    python -m prunekit.report checkpoints/recovered

For a folder with logging.jsonl this draws curves.png beside it, where its history tells of zeros sparsity.png, and
where they became more in training quality.png. Everything is drawn from logging.jsonl, pruning_info.json and
sparsity.json, never from printed logs.
"""

from pathlib import Path
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import history, read_json
from prunekit.checkpoint.records import CURVES, LOG, QUALITY, SPARSITY, ZEROS
from prunekit.errors import PruneKitError, run_script
from prunekit.rules import REAL, TEXT, Items, Keys, Rule, check

from .surgery import draw_sparsity
from .training import draw_curves, draw_quality


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
    if (folder / LOG).is_file():
        draw_curves(folder, folder / CURVES)
        drawn += 1
    if records:
        draw_sparsity(records[-1], folder / SPARSITY)
        drawn += 1
    found = read_json(folder / ZEROS) if (folder / ZEROS).is_file() else {}
    if not isinstance(found, dict) or "metric" in found:  # where zeros only moved, nothing was measured
        check(found, _record_of_sparsity(found), folder / ZEROS)
        if any(event.get("after") is not None for event in found["events"]):
            draw_quality(found["events"], found["metric"], folder / QUALITY)
            drawn += 1
    if not drawn:
        raise PruneKitError(f"{folder} has neither {LOG} nor a record of sparsity: give the folder of a stage")


if __name__ == "__main__":
    run_script(main)

"""The decisions of sparse_run.sh: how sparse each cycle is, whether it is good, and which one is published.

    python -m prunekit.training.cycles plan --model checkpoints/base --sparsity 0.7 --cycles 4 --into runs/sparse.cycles
    python -m prunekit.training.cycles judge --cycles runs/sparse.cycles
    python -m prunekit.training.cycles publish --cycles runs/sparse.cycles --base checkpoints/base \\
        --out checkpoints/sparse

A folder of cycles holds the checkpoints 1, 2, ... and beside each N.json, what prunekit.evaluate says of it before and
after retraining; dense.json says it of the dense model.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, finite_float, natural
from prunekit.checkpoint import (
    fingerprint,
    history,
    history_entry,
    open_checkpoint,
    read_json,
    statistics,
    write_checkpoint,
    write_json,
)
from prunekit.checkpoint.provenance import data_record
from prunekit.checkpoint.records import COMMAND, QUALITY
from prunekit.errors import PruneKitError, run_script
from prunekit.report.results import read_results
from prunekit.rules import COUNT, REAL, TEXT, Items, Keys, check
from prunekit.surgery.zeros_weights import choose_weights, measure

from .zeros_settings import Gradual

CYCLES, SETTINGS = "cycles.json", "settings.json"
MOST_WORSE = 1e99  # of perplexity lost, where it can't be told
NAN = "lower --learning_rate, or train in DTYPE=bfloat16 or float32"


Scores = dict[str, float | None]  # loss and token_acc; None for NaN


def _scores(file: Path, count: int) -> list[Scores]:
    """The scores of so many models, in the file's order, each on its one data set."""
    scores: list[Scores] = [next(iter(result["datasets"].values()), {}) for result in read_results(file)]
    if len(scores) != count or not all("loss" in score for score in scores):
        raise PruneKitError(f"{file}: hasn't the loss of {count} models; remove it, and evaluate again")
    return scores


def read_cycles(folder: Path) -> dict[str, Any]:
    """The cycles that are done: loss and token_acc of the dense model, and of each cycle after pruning and retrained.

    `worse` is the share by which its perplexity is above the dense model's: of a loss that is NaN, MOST_WORSE.
    """
    [dense] = _scores(folder / "dense.json", 1)
    if dense["loss"] is None:
        raise PruneKitError(
            f"{folder / 'dense.json'}: the dense model's loss is NaN: look at its weights, or set RESTART=1 and "
            "DTYPE=bfloat16 or float32"
        )
    cycles: list[dict[str, Any]] = []
    while (file := folder / f"{len(cycles) + 1}.json").exists():
        pruned, retrained = _scores(file, 2)
        prunings = [entry for entry in history(folder / file.stem) if entry.get("sparsity")]
        if not prunings:
            raise PruneKitError(f"{folder / file.stem}: its history tells of no sparsity; remove it with {file}")
        cycles.append(
            {
                "cycle": len(cycles) + 1,
                "sparsity": prunings[-1]["sparsity"]["sparsity"],
                "before": cycles[-1]["retrained"] if cycles else dense,
                "after": pruned,
                "retrained": retrained,
                "worse": _worse(retrained["loss"], dense["loss"]),
            }
        )
    return {"dense": dense, "cycles": cycles}


def _worse(loss: float | None, dense: float) -> float:
    return MOST_WORSE if loss is None else min(math.expm1(min(loss - dense, 600)), MOST_WORSE)


_SCORES = Keys({"loss": REAL, "token_acc": REAL})
_CYCLE = Keys(
    {"cycle": COUNT, "sparsity": REAL, "worse": REAL, "retrained": _SCORES},
    needed=("cycle", "sparsity", "worse", "retrained"),
)
_CYCLES = Keys({"dense": _SCORES, "cycles": Items(_CYCLE)}, ("dense", "cycles"))


def best_cycle(cycles: list[dict[str, Any]], worse: float) -> dict[str, Any]:
    """The sparsest cycle that is good enough. PruneKitError says how far from it the best one is, if none is."""
    if not cycles:
        raise PruneKitError("no cycle is done, so none can be published")
    good = [cycle for cycle in cycles if cycle["worse"] <= worse]
    if not good:
        least = min(cycle["worse"] for cycle in cycles)
        if least == MOST_WORSE:
            raise PruneKitError(f"no cycle is good enough: the loss came to NaN; {NAN}, with RESTART=1")
        raise PruneKitError(
            f"no cycle is good enough: the best lost {least:.1%} of perplexity, WORSE={worse} allows {worse:.1%}; "
            "retrain longer (--max_steps), begin lower (START), or allow more"
        )
    return max(good, key=lambda cycle: cycle["sparsity"])


def plan(arguments: argparse.Namespace) -> None:
    settings = Gradual(
        arguments.sparsity,
        arguments.start,
        arguments.cycles,
        arguments.schedule,
        modules=arguments.modules,
        worse=arguments.worse,
    )
    checkpoint = open_checkpoint(arguments.model)
    choose_weights(checkpoint, arguments.modules)
    if arguments.into:
        names = ("sparsity", "start", "cycles", "schedule", "modules", "flags")
        wished, file = {name: getattr(arguments, name) for name in names}, arguments.into / SETTINGS
        wished |= {"fingerprint": fingerprint(checkpoint), "data": list(map(data_record, arguments.data))}
        if file.exists() and read_json(file) != wished:
            raise PruneKitError(
                f"{arguments.into} holds cycles with other settings, of another model or other data: repeat those "
                f"({SETTINGS}), or set RESTART=1 to forget them"
            )
        arguments.into.mkdir(parents=True, exist_ok=True)
        write_json(file, wished)
    print(*(f"{level:.6f}" for level in settings.levels()))


def judge(arguments: argparse.Namespace) -> int:
    from prunekit.report import draw_quality

    found = read_cycles(arguments.cycles)
    write_json(arguments.cycles / CYCLES, found)
    draw_quality(found["cycles"], "loss", arguments.cycles / QUALITY)
    if not found["cycles"]:
        raise PruneKitError(f"{arguments.cycles}: has no 1.json: no cycle is done")
    last = found["cycles"][-1]
    before, after, retrained = (
        "NaN" if (loss := last[when]["loss"]) is None else f"{loss:.4f}" for when in ("before", "after", "retrained")
    )
    came_to = f"perplexity {last['worse']:+.1%} of dense" if last["worse"] < MOST_WORSE else NAN
    print(
        f"cycle {last['cycle']}: sparsity {last['sparsity']:.1%}, loss {before}, pruned {after}, retrained "
        f"{retrained}; {came_to}"
    )
    return 0 if last["worse"] <= arguments.worse else 3


def publish(arguments: argparse.Namespace) -> None:
    found, settings = (read_json(arguments.cycles / name) for name in (CYCLES, SETTINGS))
    check(found, _CYCLES, arguments.cycles / CYCLES)
    check(settings, Keys({"modules": TEXT}), arguments.cycles / SETTINGS)
    best = best_cycle(found["cycles"], arguments.worse)
    checkpoint = open_checkpoint(arguments.cycles / str(best["cycle"]))
    settings |= {"cycle": best["cycle"]}
    numbers = statistics(checkpoint)
    metrics = {f"{key}_dense": value for key, value in found["dense"].items()} | best["retrained"]
    entry = history_entry("sparse_run", arguments.base, numbers, numbers, None, metrics, settings)
    entry["sparsity"] = measure(checkpoint, settings.get("modules"))
    write_checkpoint(checkpoint, arguments.out, entry, arguments.overwrite, extra_files=arguments.cycles.glob(COMMAND))
    print(
        f"cycle {best['cycle']} of {len(found['cycles'])} is the sparsest good one: {best['sparsity']:.1%} zeros, "
        f"perplexity {best['worse']:+.1%}; published as {arguments.out}"
    )


def main() -> int | None:
    parser = Parser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    planning = parts.add_parser("plan", help="print how sparse each cycle is")
    planning.add_argument("--model", required=True, help="the dense checkpoint")
    planning.add_argument("--sparsity", type=finite_float, required=True, help="after the last cycle")
    planning.add_argument("--start", type=finite_float, help="after the first one (default: half of it)")
    planning.add_argument("--cycles", type=natural, default=4)
    planning.add_argument("--schedule", default="exponential", help="exponential or cubic")
    planning.add_argument("--modules", help="regex, as sparsify.py's")
    planning.add_argument("--into", type=Path, metavar="DIR", help="begin cycles there, or go on with these")
    planning.add_argument("--data", nargs="*", default=[], help="what is trained and measured on, likewise")
    planning.add_argument("--flags", help="all else that cycles in one folder must have in common")
    for name, text in (("judge", "0: the last cycle is good, 3: it isn't"), ("publish", "the best one")):
        part = parts.add_parser(name, help=text)
        part.add_argument("--cycles", type=Path, required=True, help="folder of the cycles")
    part.add_argument("--base", required=True, help="the dense checkpoint")
    part.add_argument("--out", required=True, help="checkpoint folder to write")
    part.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    for part in parts.choices.values():
        part.add_argument("--worse", type=finite_float, default=0.15, help="perplexity lost that is good enough")
    arguments = parser.parse_args()
    return {"plan": plan, "judge": judge, "publish": publish}[arguments.part](arguments)


if __name__ == "__main__":
    run_script(main)

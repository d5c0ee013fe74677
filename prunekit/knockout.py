"""Which layers are cheap? Remove one, train briefly, look at token_acc; for every layer in question.

    python -m prunekit.knockout --model checkpoints/base --out runs/knockout --text all --vision 0-5 -- SWIFT-ARGS

`knockout_check.sh` calls this with ms-swift's arguments after `--`. The baseline, the whole model after the same short
training, is a run like the others. Each finished run is one file under OUT/runs, written at once, so that a killed
sweep goes on where it was; ranking.json and ranking.png are drawn anew from these files after every run.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint, write_json
from .errors import PruneKitError, run_script
from .trained_knockouts import Knockout, Sweep, Training, plan_knockouts


def rank(results: list[dict[str, Any]], settings: dict[str, Any], model: str) -> dict[str, Any]:
    """The content of ranking.json: removals by what is left of the baseline's token_acc, cheapest first."""
    baseline = next((result for result in results if result["stack"] is None and not result["error"]), None)
    removals = []
    for result in results:
        if result["stack"] is not None:
            relative = (
                baseline and result["token_acc"] is not None and result["token_acc"] / baseline["token_acc"]
            )
            removals.append(result | {"relative": relative or None})
    removals.sort(key=lambda result: (result["relative"] is None, -(result["relative"] or 0)))
    return {
        "metric": "token_acc",
        "model": model,
        "baseline": baseline,
        "removals": removals,
        "settings": settings,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one checkpoint from another by config, tensors and the time its files were written, reading no weights."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    parts = [
        json.dumps(checkpoint.config, sort_keys=True),
        *(f"{name}{t.shape}" for name, t in checkpoint.tensors.items()),
    ]
    parts += [f"{file.name}{file.stat().st_size}{file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    own, swift = sys.argv[1:], []
    if "--" in own:
        own, swift = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the sweep; an unfinished one is continued"
    )
    parser.add_argument("--text", default="all", help="text layers: all, none, or like 0-3,10 (default: all)")
    parser.add_argument("--vision", default="all", help="vision blocks, likewise")
    parser.add_argument("--group", default="knockout", help="W&B group")
    parser.add_argument("--gpus", default="", help="like 0,1,2,3; empty: CPU")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side; GPUs are shared out (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-task",
        type=int,
        default=1,
        help="on a Ray cluster (RAY_ADDRESS), instead of --gpus and --jobs",
    )
    args = parser.parse_args(own)

    checkpoint = open_checkpoint(args.model)
    runs = plan_knockouts(checkpoint, args.text, args.vision)
    gpus = [gpu for gpu in args.gpus.split(",") if gpu]
    if args.jobs < 1 or (gpus and args.jobs > len(gpus)):
        raise PruneKitError(
            f"--jobs {args.jobs}: choose 1 to {len(gpus) or os.cpu_count()}, one GPU a run at the least"
        )

    settings_file = args.out / "settings.json"
    own_files = {"lock", ".settings.json.new"}  # all that a sweep killed at its very start leaves
    is_sweep = not args.out.exists() or settings_file.exists()
    if not is_sweep and (not args.out.is_dir() or {path.name for path in args.out.iterdir()} - own_files):
        raise PruneKitError(f"{args.out}: is in use, and no sweep of knockouts; choose another OUT")
    args.out.mkdir(parents=True, exist_ok=True)
    lock = (args.out / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PruneKitError(f"{args.out}: another sweep is running there; choose another OUT") from None
    settings = {"fingerprint": fingerprint(checkpoint), "swift": swift}
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise PruneKitError(
            f"{args.out}: holds a sweep of another model or other settings; choose another OUT or remove it"
        )
    write_json(settings_file, settings)
    (args.out / "runs").mkdir(exist_ok=True)
    shutil.rmtree(args.out / "work", ignore_errors=True)

    model_type = args.model_type or checkpoint.config["model_type"]
    training = Training(checkpoint.path, model_type, args.out, tuple(swift), args.group)
    sweep = Sweep(training, gpus, args.jobs, args.gpus_per_task)
    failed = sweep_all(sweep, runs, settings)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def sweep_all(sweep: Sweep, runs: list[Knockout], settings: dict[str, Any]) -> list[str]:
    """Do every run that isn't done; returns a line for each that failed."""
    from tqdm import tqdm

    from .report import draw_ranking

    results = sweep.finished(runs)
    todo = [run for run in runs if run.name not in results]
    if results:
        print(f"{len(results)} of {len(runs)} runs are done already")

    out = sweep.training.out

    def write_ranking() -> dict[str, Any]:
        ranking = rank(list(results.values()), settings, str(sweep.training.model))
        write_json(out / "ranking.json", ranking)
        if ranking["baseline"] and ranking["removals"]:
            draw_ranking(ranking, out / "ranking.png")
        return ranking

    with (
        contextlib.closing(sweep.do_all(todo)) as done,
        tqdm(total=len(runs), initial=len(results), desc="knockouts", unit="run") as bar,
    ):
        for result in done:
            results[result["name"]] = result
            shown = result["error"] or f"token_acc {result['token_acc']:.4f}"
            bar.write(f"{result['name']:>10}  {shown}  ({result['seconds']:.0f} s)", file=sys.stdout)
            bar.update()
            write_ranking()
    ranking = write_ranking()
    shutil.rmtree(out / "work", ignore_errors=True)
    print(f"wrote {out / 'ranking.json'} and ranking.png")
    for entry in ranking["removals"]:
        if entry["relative"] is not None:
            print(f"{entry['name']:>10}  {entry['relative']:7.1%} of the baseline's token_acc")
    return [f"{result['name']}: {result['error']}" for result in results.values() if result["error"]]


if __name__ == "__main__":
    run_script(main)

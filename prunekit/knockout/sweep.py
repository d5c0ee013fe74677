"""Which layers are cheap? Train briefly without each of the finalists of a scan, and rank them all.

    python -m prunekit.knockout.sweep --model checkpoints/base --out runs/knockout --finalists 10 -- SWIFT-ARGS

`knockout_check.sh` calls this after `prunekit.scan`, with ms-swift's arguments after `--`. What OUT/scan/scan.json
finds cheapest is trained; without a scan, everything is. The baseline, the whole model after the same short training,
is a run like the others. Each finished run is a file under OUT/trained/runs at once, so that a killed sweep goes on
where it was; ranking.json, ranking.csv and the figures are made anew after every run.
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunekit.arguments import natural, positive_int, split_arguments
from prunekit.checkpoint import open_checkpoint, read_json
from prunekit.checkpoint.provenance import made_from
from prunekit.checkpoint.work_folder import claim_folder, fingerprint
from prunekit.data.batches import read_calibration
from prunekit.data.groups import FEW, groups_of
from prunekit.errors import PruneKitError, run_script

from .folder import DRAFT, PICTURES, RANKING, TABLE, check_folder
from .processes import share_out
from .ranking import build_ranking, finalists, log_to_wandb, write_ranking
from .removal import BASELINE, MEAN, WORST, FewerExperts, Removal, knockout_parser, list_removals
from .trained import Run, Sweep, Training, run_name


def _finalists(text: str) -> int | None:
    return None if text.lower() == "all" else natural(text)


def read_scan(file: Path) -> dict[str, Any]:
    """What a scan found. PruneKitError for a file that is damaged."""

    def check(entry: dict[str, Any], *names: str) -> None:
        numbers = [entry[key] for key in ("token_acc", "loss", "parameters", *names)]
        if not all(number is None or type(number) in (int, float) for number in numbers):
            raise TypeError

    scan = read_json(file)
    try:
        check(scan["baseline"])
        fewer = [(FewerExperts(int(entry["experts"])), entry) for entry in scan.get("experts", ())]
        layers = [(Removal(entry["stack"], int(entry["layer"])), entry) for entry in scan["removals"]]
        for which, entry in [*layers, *fewer]:
            check(entry, scan["predictor"], "parameters_saved")
            if str(which) != entry["name"]:
                raise ValueError
            entry["error"], entry["decided"], entry["generation"]
            for scores in entry.get("groups", {}).values():
                check(scores | {"parameters": None})
        for point in (scan["greedy"] or {"path": []})["path"]:
            check(point)
            " ".join(point["removed"])
        " ".join([*scan["best"], scan["settings"]["fingerprint"]])
        scan["counts_suffix"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PruneKitError(f"{file}: is no scan's result; remove it and run again") from None
    return scan


def choose_runs(runs: list[Run], scan: dict[str, Any] | None, count: int | None) -> list[Run]:
    """The baseline and the `count` finalists of the scan (None: all that it could score); all runs without a scan."""
    if count == 0:
        return []
    if scan is None:
        return runs
    best = scan["best"][:count] if count is not None else finalists(scan, None)
    chosen = {run_name(run): run for run in runs}
    return [chosen[name] for name in (BASELINE, *best) if name in chosen]


def sweep_all(
    sweep: Sweep, runs: list[Run], scan: dict[str, Any] | None, out: Path, gate: str = MEAN
) -> dict[str, Any]:
    """Do every run that isn't done; returns the ranking, which is on disk after every run."""
    results = sweep.finished(runs)
    todo = [run for run in runs if run_name(run) not in results]
    if results:
        print(f"{len(results)} of {len(runs)} runs are done already")
    training = sweep.training
    settings = {"swift": list(training.arguments), "scan": scan and scan["settings"]}
    of = fingerprint(open_checkpoint(training.model))

    def write() -> dict[str, Any]:
        ranking = build_ranking(scan, list(results.values()), str(training.model), settings, of, training.by, gate)
        write_ranking(out, ranking)
        return ranking

    with (
        contextlib.closing(sweep.do_all(todo)) as done,
        tqdm(total=len(runs), initial=len(results), desc="knockouts", unit="run", disable=not runs) as bar,
    ):
        for result in done:
            results[result["name"]] = result
            shown = result["error"] or f"token_acc {result['token_acc']:.4f}"
            bar.write(f"{result['name']:>10}  {shown}  ({result['seconds']:.0f} s)", file=sys.stdout)
            bar.update()
            write()
    return write()


def main() -> None:
    own, swift = split_arguments()
    parser = knockout_parser(__doc__, "sweep")
    parser.add_argument(
        "--finalists",
        type=_finalists,
        default=10,
        help="how many to train: a number, 0, or all (default: 10)",
    )
    parser.add_argument("--group", default="knockout", help="W&B group")
    parser.add_argument("--gpus", default="", help="like 0,1,2,3; empty: CPU")
    parser.add_argument(
        "--jobs", type=positive_int, default=1, help="runs side by side; GPUs are shared out (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-task",
        type=natural,
        default=1,
        help="on a Ray cluster (RAY_ADDRESS), instead of --gpus and --jobs",
    )
    args = parser.parse_args(own)
    if args.gate == WORST and not args.by:
        parser.error("--gate worst needs --by")

    checkpoint = open_checkpoint(args.model)
    notes: list[str] = []
    runs: list[Run] = [None, *list_removals(checkpoint, args.text, args.vision, notes)]
    gpus = [gpu for gpu in args.gpus.split(",") if gpu]
    # On other numbers of GPUs the same flags are other batches
    each = args.gpus_per_task if os.environ.get("RAY_ADDRESS") else len(share_out(gpus, args.jobs)[0])
    check_folder(args.out)

    scan, model = None, fingerprint(checkpoint)
    if (args.out / "scan" / "scan.json").exists():
        scan = read_scan(args.out / "scan" / "scan.json")
        if scan["settings"]["fingerprint"] != model:
            raise PruneKitError(f"{args.out}: holds a scan of another model; choose another OUT or remove it")
        if (scan.get("by"), scan.get("gate", MEAN)) != (args.by, args.gate):
            raise PruneKitError(f"{args.out}: holds a scan by other groups or another gate: scan again (MODE=scan)")
    for note in notes if scan is None else ():  # a scan has said it
        print(note, file=sys.stderr)
    data = made_from(swift)
    validation = [record["path"] for record in data.get("val_dataset", ())]
    if args.by and not validation:
        raise PruneKitError(f"--by {args.by}: needs rows to group: give --val_dataset (VAL_DATASET)")
    for name in validation if args.by else ():
        groups_of(read_calibration(name), args.by, FEW)
    runs = choose_runs(runs, scan, args.finalists)
    here = not gpus and not os.environ.get("RAY_ADDRESS") and not os.environ.get("OMP_NUM_THREADS")
    training = Training(
        checkpoint.path,
        args.model_type or checkpoint.config["model_type"],
        args.out / "trained",
        tuple(swift),
        args.group,
        args.by,
        tuple(validation),
        max(1, (os.cpu_count() or 1) // args.jobs) if here else None,
    )
    with contextlib.ExitStack() as held:
        if runs:
            data.pop("model", None)
            settings = {"fingerprint": model, "swift": swift, "data": data, "gpus_per_run": each}
            settings |= {"by": args.by} if args.by else {}
            held.enter_context(claim_folder(training.out, settings, "sweep of knockouts"))
            shutil.rmtree(training.out / "work", ignore_errors=True)
            for path in args.out.iterdir():
                if DRAFT.fullmatch(path.name):
                    path.unlink()
        args.out.mkdir(parents=True, exist_ok=True)
        ranking = sweep_all(Sweep(training, gpus, args.jobs, args.gpus_per_task), runs, scan, args.out, args.gate)
        shutil.rmtree(training.out / "work", ignore_errors=True)
    pictures = [args.out / name for name in PICTURES if (args.out / name).exists()]
    log_to_wandb(ranking, pictures, args.group)
    print(f"wrote {args.out / RANKING}, {TABLE} and {', '.join(path.name for path in pictures)}")
    for entry in ranking["removals"]:
        if entry["relative_trained"] is not None:
            group = entry.get("worst_group")
            worst = f"; worst: {group} {entry['groups'][group]['relative']:.1%}" if group else ""
            print(f"{entry['name']:>10}  {entry['relative_trained']:7.1%} of the baseline's token_acc, trained{worst}")
    if (greedy := ranking["greedy"]) and greedy["bend"] is not None:
        print(f"the greedy curve bends behind {' '.join(greedy['path'][greedy['bend']]['removed'])}")
    trained = [ranking["baseline"]["trained"], *(entry["trained"] for entry in ranking["removals"])]
    failed = [f"{run['name']}: {run['error']}" for run in trained if run and run["error"]]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

"""Fast scan: score every removal of a layer in memory, or find a set of them one by one, without training.

    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/knockout/scan
    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan --race --greedy 8
    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan --processes 8
    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan --by skill --gate worst
    python -m prunekit.scan --model Qwen3-30B-A3B --dataset data/val.jsonl --out runs/scan --text none --experts all \\
        --calib data/train.jsonl

Writes OUT/scan.json: token_acc, loss, KL, block influence, parameters and time saved by each removal; with --greedy the
path of sets. With --experts also what a mixture-of-experts model loses with fewer experts in each mixture, unfitted.
Every measurement is a line of OUT/records.jsonl at once, so the same command continues an interrupted
scan. With --by COLUMN each group of rows that have the same there is scored, too; --gate worst goes by the group that
keeps least. Several processes, a GPU each, split the samples, the rows to answer, and with --heal the removals; with
RAY_ADDRESS set the nodes of a Ray cluster do, but for --heal, which refuses it.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from prunekit.arguments import device, natural, positive_int, share
from prunekit.checkpoint import open_checkpoint, statistics, write_json
from prunekit.checkpoint.work_folder import claim_folder, fingerprint
from prunekit.data.batches import read_calibration
from prunekit.data.groups import FEW, groups_of
from prunekit.data.rows import Rows, check_answered, is_text
from prunekit.errors import PruneKitError, run_script
from prunekit.knockout import cluster
from prunekit.knockout.ranking import finalists, kept_shares, worst_group
from prunekit.knockout.removal import (
    BASELINE,
    WORST,
    Candidate,
    FewerExperts,
    Removal,
    knockout_parser,
    list_experts,
    list_removals,
)
from prunekit.knockout.scanner import Job, encoder_for, rows_of
from prunekit.knockout.search import CRITERION, HealedScan, Scan, find_path
from prunekit.model.load import check_causal
from prunekit.surgery.experts import plan_experts

PREDICTOR = "token_acc"  # what of an untrained removal says most about the trained one: see docs/knockout.md


def main() -> None:
    parser = knockout_parser(__doc__, "scan")
    parser.add_argument("--dataset", required=True, help='JSONL to score on: ms-swift messages or {"text": ...}')
    parser.add_argument(
        "--tokens", type=natural, default=65_536, help="of the data set to score on, 0: all (default: 65536)"
    )
    parser.add_argument(
        "--max-length",
        type=positive_int,
        default=4096,
        help="of a row; longer ones are left out (default: 4096)",
    )
    parser.add_argument("--batch-tokens", type=positive_int, default=4096, help="padding included (default: 4096)")
    parser.add_argument("--no-suffix", action="store_true", help="don't count what ends every answer (<|im_end|>)")
    parser.add_argument("--race", action="store_true", help="samples only where it is undecided which are the best")
    parser.add_argument("--race-share", type=share, default=0.3, help="of the full scan's work at most (default: 0.3)")
    parser.add_argument("--best", type=positive_int, default=10, help="how many the race is for (default: 10)")
    parser.add_argument("--greedy", type=positive_int, metavar="K", help="find a set of K layers, one by one")
    parser.add_argument("--target-params", type=share, metavar="SHARE", help="or until so many parameters are left")
    parser.add_argument("--path-only", action="store_true", help="the set alone, no ranking of single layers")
    parser.add_argument(
        "--heal", action="store_true", help="score with the seams healed (with --greedy; needs --calib)"
    )
    parser.add_argument(
        "--experts", default="none", help="left in each mixture: none, all (by eighths), or like 96,64 (default: none)"
    )
    parser.add_argument("--calib", metavar="JSONL", help="to heal and choose experts on: other rows than --dataset's")
    parser.add_argument("--calib-tokens", type=positive_int, default=16_384, metavar="N", help="(default: 16384)")
    parser.add_argument(
        "--generate", type=natural, default=0, metavar="N", help="also answer N rows without each of the best"
    )
    parser.add_argument(
        "--generate-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="of such an answer (default: 64)",
    )
    parser.add_argument("--device", type=device, help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--processes", type=positive_int, default=1, help="on this machine, a GPU each (default: 1)")
    parser.add_argument(
        "--gpus-per-task",
        type=natural,
        default=0,
        help="on a Ray cluster: 0 for its CPUs, else each task takes one (default: 0)",
    )
    args = parser.parse_args()
    if args.heal and not (args.calib and (args.greedy or args.target_params)):
        parser.error("--heal needs --calib, and --greedy or --target-params")
    if args.path_only and (args.race or args.experts != "none" or not (args.greedy or args.target_params)):
        parser.error("--path-only needs --greedy or --target-params, and makes no ranking: no --race, no --experts")
    if args.experts != "none" and not args.calib:
        parser.error("--experts needs --calib: which of them go is chosen on other rows than those that score them")
    if args.calib and not args.heal and args.experts == "none":
        parser.error("--calib is for --heal and --experts")
    if args.gate == WORST and (args.race or not args.by):
        parser.error("--gate worst needs --by, and every removal scored on every row: leave out --race")
    if os.environ.get("RAY_ADDRESS"):
        if args.heal:
            parser.error("--heal works on one machine: unset RAY_ADDRESS")
        if args.processes > 1 or "RANK" in os.environ:
            parser.error("--processes and torchrun are for one machine: unset RAY_ADDRESS")
    if torch.cuda.is_available() and args.processes > torch.cuda.device_count() and args.device != "cpu":
        parser.error(f"--processes {args.processes}: needs a GPU each, there are {torch.cuda.device_count()}")
    run_scan(args)


def run_scan(args: argparse.Namespace) -> None:
    """Refuse what can be refused, then scan, in this process or as several."""
    checkpoint = open_checkpoint(args.model)
    check_causal(checkpoint)
    notes: list[str] = []
    candidates = list_removals(checkpoint, args.text, args.vision, notes)
    numbers = list_experts(checkpoint, args.experts)
    if not candidates and not numbers:
        raise PruneKitError(f"--text {args.text} --vision {args.vision}: names no layer to score")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if world > 1 and torch.cuda.is_available() and device in (None, "cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    job = Job(
        args.model, args.dataset, args.tokens or None, args.max_length, args.batch_tokens, args.race,
        not args.no_suffix,
        device, args.dtype, args.model_type, args.template, args.by,
    )  # fmt: skip
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    calib = read_calibration(args.calib) if args.calib else None
    pictures = any(row.get("images") for row in calib or ())
    if args.heal and not pictures and any(k.stack == "vision" for k in candidates):
        raise PruneKitError(f"--calib {args.calib}: no row has an image, to heal vision blocks on; or --vision none")
    rows = rows_of(job)
    if args.by:
        groups_of(rows, args.by, FEW)
    if args.generate:
        if is_text(rows[0]):
            raise PruneKitError(
                f"--generate: {args.dataset} has texts, no questions with answers; give messages, or leave it out"
            )
        for number, row in enumerate(rows[: args.generate], 1):
            check_answered(f"dataset {args.dataset} row {number}", row)
    encoder_for(job)  # the tokenizer is there, model type and template are known
    # How it is computed, and where things lie: the model goes by its fingerprint. Samples are scored one by one: they
    # can be grouped again.
    ignored = ("model", "out", "gpus_per_task", "device", "processes", "by", "gate", "path_only")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    settings |= {
        "fingerprint": fingerprint(checkpoint),
        "data": [each.record for each in (rows, calib) if each],
    }
    with contextlib.ExitStack() as held:
        if rank == 0:
            held.enter_context(claim_folder(args.out, settings, "scan"))
        if args.processes > 1 and world == 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            os.execv(sys.executable, [*command, str(args.processes), "-m", "prunekit.scan", *sys.argv[1:]])
        if world > 1:
            # A process that dies ends the others at once; one that is slow may take its time
            distributed.init_process_group("gloo", timeout=timedelta(days=1))
        for note in notes if rank == 0 else ():
            print(note, file=sys.stderr)
        if os.environ.get("RAY_ADDRESS"):
            held.enter_context(cluster.connected())
        result = search(args, job, candidates, numbers, calib)
        if rank == 0:
            write_json(args.out / "scan.json", result | {"settings": settings})
            print_scan(result)
    if world > 1:
        distributed.destroy_process_group()


def search(
    args: argparse.Namespace, job: Job, candidates: list[Removal], numbers: list[int], calib: Rows | None
) -> dict[str, Any]:
    """Do what the command line asks for: the content of scan.json."""
    scan = Scan(job, args.out / "records.jsonl", min(1, args.gpus_per_task))
    best: list[str] | None = None
    undecided: set[str] = set()
    fewer = scan.fewer_experts(numbers, calib, args.calib_tokens) if calib else []
    if args.race:
        best, undecided = scan.race([], candidates, args.best, {str(k): 1.0 for k in candidates}, args.race_share)
    singles = [] if args.path_only else candidates
    if fewer or not args.race:
        scan.measure([], fewer if args.race else [*singles, *fewer], range(scan.batches), "scan")
    result = describe(scan, singles, best, undecided, args.gate, fewer)
    answers = args.generate, args.generate_tokens
    if args.generate:
        chosen = result["best"][: args.best]
        generated = scan.generate([[k] for k in candidates if str(k) in chosen], *answers)
        entries = [entry for entry in result["removals"] if entry["name"] in chosen]
        for entry, found in zip(entries, generated, strict=True):
            entry["generation"] = found
    if args.greedy or args.target_params:
        searched = scan
        if calib and args.heal:
            searched = HealedScan(job, args.out / "records-seams.jsonl", calib, args.calib_tokens)
        race_share = args.race_share if args.race and not args.heal else None
        path = find_path(searched, candidates, args.greedy, args.target_params, race_share, *answers, args.gate)
        result["greedy"] = {
            "healed": args.heal,
            "criterion": f"{CRITERION} per parameter saved",
            "path": path,
        }
    return result


def describe(
    scan: Scan,
    candidates: Sequence[Removal],
    best: list[str] | None,
    undecided: set[str],
    gate: str,
    fewer: Sequence[FewerExperts] = (),
) -> dict[str, Any]:
    """The content of scan.json."""

    def entry(candidate: Candidate, parameters: int | None) -> dict[str, Any]:
        assert parameters is not None  # each of these is possible
        scores = scan.score([], str(candidate))
        return {
            **candidate.json,
            "parameters": parameters,
            "parameters_saved": scan.parameters - parameters,
            **scan.layer_figures([], str(candidate)),
            **scores,
            "decided": str(candidate) not in undecided,
            "generation": None,
            "error": None if scores["loss"] is not None else "loss is NaN",
        }

    def parameters_with(experts: int) -> int:
        return statistics(plan_experts(scan.checkpoint, experts).outline)["parameters"]

    base = scan.score([], BASELINE)
    if base["loss"] is None:
        raise PruneKitError(
            f"{scan.job.model}: its loss is NaN with all its layers, so that none can be judged: compute in another "
            "--dtype (bfloat16, float32), or look at its weights"
        )
    result = {
        "predictor": PREDICTOR if best is None else CRITERION,
        "counts_suffix": scan.job.counts_suffix,
        "baseline": {**base, "parameters": scan.parameters},
        "removals": [entry(removal, scan.parameters_without([removal])) for removal in candidates],
        "greedy": None,
    }
    result |= {"experts": [entry(each, parameters_with(each.experts)) for each in fewer]} if fewer else {}
    result |= {"by": scan.job.by, "gate": gate} if scan.job.by else {}
    return result | {"best": best or finalists(result, None)}


def _worst(entry: dict[str, Any], base: dict[str, Any]) -> str:
    kept = kept_shares(entry, base)
    group = worst_group(kept)
    return f"  worst: {group} keeps {kept[group]:.1%}" if group else ""


def print_scan(result: dict[str, Any]) -> None:
    base = result["baseline"]
    counted = "" if result["counts_suffix"] else ", suffix tokens left out"
    print(
        f"baseline: token_acc {base['token_acc']:.4f}, loss {base['loss']:.4f} ({base['samples']} samples, "
        f"{base['tokens']} tokens{counted})"
    )
    by_name = {entry["name"]: entry for entry in result["removals"]}
    for entry in [*(by_name[name] for name in result["best"]), *result.get("experts", ())]:
        if entry["error"]:
            print(f"{entry['name']:>10}  {entry['error']}")
            continue
        answered = entry["generation"]
        print(
            f"{entry['name']:>10}  token_acc {entry['token_acc']:.4f}  loss {entry['loss']:.4f} ± "
            f"{entry['standard_error']['loss'] or 0:.4f}"
            f"  KL {entry['kl']:.4f}  {entry['parameters_saved'] / base['parameters']:.1%} of the parameters"
            + (f"  exact match {answered['exact_match']:.3f}" if answered else "")
            + _worst(entry, base)
            + ("" if entry["decided"] else "  (undecided)")
        )
    for entry in (result["greedy"] or {}).get("path", [])[1:]:
        print(
            f"without {' '.join(entry['removed'])}: token_acc {entry['token_acc']:.4f}  loss {entry['loss']:.4f}"
            f"  {entry['parameters'] / base['parameters']:.1%} of the parameters left{_worst(entry, base)}"
        )
    entries = [*result["removals"], *(result["greedy"] or {}).get("path", [])]
    answered = [entry["generation"] for entry in entries if entry["generation"]]
    if cut := sum(found["n_cut"] for found in answered):
        print(
            f"warning: {cut} of {sum(found['samples'] for found in answered)} answers were cut at "
            f"{answered[0]['max_new_tokens']} tokens: if right ones are as long, raise --generate-tokens "
            f"(GENERATE_TOKENS)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_script(main)

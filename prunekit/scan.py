"""Fast scan: score every removal of a layer in memory, or find a set of them one by one, without training.

    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/knockout/scan
    torchrun --nproc_per_node 4 -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan
    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan --race --greedy 8

Writes OUT/scan.json: token_acc, loss, KL, block influence, parameters and time saved by each removal; with --greedy the
path of sets. Every measurement is a line of OUT/records.jsonl at once, so the same command continues an interrupted
scan. The processes of torchrun split the samples; with RAY_ADDRESS set the nodes of a Ray cluster do.
"""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from . import cluster
from .arguments import Parser
from .calibration import calibrate, read_calibration
from .checkpoint import layer_numbers, open_checkpoint, statistics, write_json
from .errors import PruneKitError, run_script
from .evaluate import generate, read_rows, score_answers
from .healed_scan import HealedScanner
from .ranking import finalists
from .scanner import Job, Scanner, check_causal, finite, load_scanner, template_of
from .trained_knockouts import BASELINE, Knockout, plan_knockouts, plan_without
from .work_folder import claim_folder, fingerprint

METRICS = {"token_acc": "right", "loss": "loss", "kl": "kl"}  # and what of a sample they are means of
PREDICTOR = "token_acc"  # what of an untrained removal says most about the trained one: see docs/knockout.md
CRITERION = "loss"  # of paths and races: finer than token_acc, which changes by whole tokens
SURE = 2.0  # standard errors
FEW_SAMPLES = 8  # below, a standard error says nothing


def measure_batch(item: tuple[Job, tuple[Knockout, ...], tuple[Knockout, ...], int]) -> dict[str, Any]:
    """One line of records.jsonl, computed wherever this process runs."""
    job, gone, candidates, index = item
    found = load_scanner(job).measure(gone, candidates, index)
    return {"gone": [knockout.name for knockout in gone], "batch": index, **found}


def count_batches(job: Job) -> int:
    return len(load_scanner(job).batches)


class Records:
    """What was measured, by removed layers and batch; a line of a file each, so that nothing is measured twice."""

    def __init__(self, file: Path | None):
        self.file, self.scores, self.layers = file, {}, {}
        if file and file.exists():
            text = file.read_text()
            if not text.endswith("\n"):
                file.write_text(
                    text[: text.rfind("\n") + 1]
                )  # a kill tore the last line: it is measured again
            for line in text.splitlines()[: text.count("\n")]:
                self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        key = (tuple(record["gone"]), record["batch"])
        self.scores.setdefault(key, {}).update(record["scores"])
        self.layers.setdefault(key, (record["influence"], record["seconds"]))

    def add(self, record: dict[str, Any]) -> None:
        if self.file:
            with self.file.open("a") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._take(record)

    def table(self, gone: Sequence[Knockout], names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """By name: `right`, `loss`, `kl` and `tokens`, each (samples,), over the batches in which all names were scored."""
        key = tuple(knockout.name for knockout in gone)
        batches = [
            scores
            for (removed, _), scores in sorted(self.scores.items())
            if removed == key and all(name in scores for name in names)
        ]
        return {
            name: {
                kind: np.array([value for scores in batches for value in scores[name][kind]], dtype=float)
                for kind in ("right", "loss", "kl", "tokens")
            }
            for name in names
        }


def paired(table: dict[str, dict[str, np.ndarray]], one: str, other: str, metric: str) -> tuple[float, float]:
    """(difference of a metric per token, one less other; its standard error), over the same samples."""
    kind = METRICS[metric]
    difference, tokens = table[one][kind] - table[other][kind], table[one]["tokens"]
    mean = float(difference.sum() / tokens.sum())
    rest = difference - mean * tokens
    count = len(rest)
    error = math.sqrt(float((rest**2).sum()) * count / max(count - 1, 1)) / float(tokens.sum())
    return mean, error if count > 1 else math.inf


class Scan:
    """A job's removals, measured here, by the processes of torchrun or by a Ray cluster."""

    def __init__(self, job: Job, records: Path | None, gpus_per_task: int = 0, quiet: bool | None = None):
        self.job, self.checkpoint = job, open_checkpoint(job.model)
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.records = Records(records)
        if self.world > 1:  # one reads, so that all do the same
            shared = [self.records]
            distributed.broadcast_object_list(shared)
            self.records = shared[0]
            self.records.file = records if self.rank == 0 else None
        self.gpus_per_task, self.quiet = gpus_per_task, quiet or self.rank > 0 or None
        self.cluster = bool(os.environ.get("RAY_ADDRESS"))
        (self.batches,) = self._everywhere(count_batches, [job]) if self.cluster else (count_batches(job),)
        self.parameters = statistics(self.checkpoint)["parameters"]

    def _everywhere(self, function: Callable, items: list) -> Iterator[Any]:
        for _, result in cluster.run_tasks(function, items, gpus=self.gpus_per_task):
            if isinstance(result, Exception):
                raise result
            yield result

    def generate(self, gone: Sequence[Knockout], rows: int) -> dict[str, Any] | None:
        """Exact match and CER of real greedy answers without these layers; by the first process."""
        item = (self.job, tuple(gone), rows)
        if self.cluster:
            (found,) = self._everywhere(generate_without, [item])
            return found
        return generate_without(item) if self.rank == 0 else None

    def parameters_without(self, gone: Sequence[Knockout]) -> int | None:
        """Parameters that are left; None where these layers can't be removed together."""
        if not gone:
            return self.parameters
        try:
            return statistics(plan_without(self.checkpoint, gone).result)["parameters"]
        except PruneKitError:
            return None

    def measure(
        self, gone: Sequence[Knockout], candidates: Sequence[Knockout], batches: Sequence[int], what: str
    ) -> None:
        """Have records of these candidates in these batches, measuring what is missing."""
        key, items = tuple(k.name for k in gone), []
        for index in batches:
            known = self.records.scores.get((key, index), {})
            missing = tuple(k for k in candidates if k.name not in known)
            if missing or BASELINE not in known:
                items.append((self.job, tuple(gone), missing, index))
        total = sum(1 + len(item[2]) for item in items)
        with tqdm(total=total, desc=what, unit="pass", disable=self.quiet, leave=False) as bar:
            if self.cluster:
                for record in self._everywhere(measure_batch, items):
                    self.records.add(record)
                    bar.update(len(record["scores"]))
                return
            for start in range(0, len(items), self.world):
                mine = items[start : start + self.world][self.rank : self.rank + 1]
                found = []
                for job, gone_, missing, index in mine:
                    scores = load_scanner(job).measure(gone_, missing, index, lambda: bar.update(self.world))
                    found.append({"gone": list(key), "batch": index, **scores})
                    bar.update(self.world)
                if self.world > 1:
                    gathered: list[list] = [[] for _ in range(self.world)]
                    distributed.all_gather_object(gathered, found)
                    found = [record for part in gathered for record in part]
                for record in found:
                    self.records.add(record)

    def race(
        self,
        gone: Sequence[Knockout],
        candidates: Sequence[Knockout],
        keep: int,
        weight: dict[str, float],
        share: float,
        what: str = "race",
    ) -> tuple[list[str], set[str]]:
        """Find the `keep` best candidates (by the loss they add, times their weight) without scoring all of them on all samples.

        Successive accepts and rejects (Bubeck, Wang and Viswanathan 2013): after every few batches, a candidate whose
        paired difference to the one on the other side of the cut is over `SURE` standard errors is decided, and gets no
        more samples. Ends when all are decided, the samples are used up, or `share` of the full scan's layer runs is.
        Returns the names of the best, and of those that were left undecided.
        """
        undecided, chosen, best = list(candidates), [], []
        cost = {k.name: 1 + self._behind(k) for k in candidates}
        every = self._behind(Knockout("vision", -1))
        full, spent = self.batches * (every + sum(cost.values())), 0
        step = max(1, self.batches // 16)
        step = -(-step // self.world) * self.world
        for start in range(0, self.batches, step):
            batches = range(min(start + step, self.batches))
            self.measure(gone, undecided, batches[start:], what)
            spent += len(batches[start:]) * (every + sum(cost[k.name] for k in undecided))
            table = self.records.table(gone, [BASELINE, *(k.name for k in undecided)])
            if len(table[BASELINE]["tokens"]) < FEW_SAMPLES:
                continue
            scaled = {
                k.name: {
                    kind: values if kind == "tokens" else (values - table[BASELINE][kind]) * weight[k.name]
                    for kind, values in table[k.name].items()
                }
                for k in undecided
            }
            order = sorted(undecided, key=lambda k: _worst_if_nan(scaled[k.name][CRITERION].sum()))
            left = keep - len(chosen)
            best = [*chosen, *(k.name for k in order[:left])]
            if left >= len(order):
                undecided = []
            for place, candidate in enumerate(order if undecided else []):
                rival = order[left] if place < left else order[left - 1]
                pair = (candidate, rival) if place < left else (rival, candidate)
                mean, error = paired(scaled, pair[0].name, pair[1].name, CRITERION)
                if mean + SURE * error < 0 or math.isnan(mean):
                    undecided.remove(candidate)
                    if place < left:
                        chosen.append(candidate.name)
            if spent >= share * full or not undecided or len(chosen) == keep:
                break
        return best, {k.name for k in undecided} if len(chosen) < keep else set()

    def _behind(self, knockout: Knockout) -> int:
        """How many layers have to be run to score a removal."""
        text, vision = (
            len(layer_numbers(self.checkpoint, stack)) if stack in self.checkpoint.family.stacks else 0
            for stack in ("text", "vision")
        )
        return text - 1 - knockout.layer if knockout.stack == "text" else text + vision - 1 - knockout.layer

    def score(self, gone: Sequence[Knockout], name: str) -> dict[str, Any]:
        """Metrics of one removal (or the baseline) per token, with the standard errors of what sets it off the baseline.

        A removal that was scored on some of the samples gets the baseline's figure on all of them and its own
        difference: so all are comparable.
        """
        everything = self.records.table(gone, [BASELINE])[BASELINE]
        tokens = everything["tokens"].sum()
        result: dict[str, Any] = {}
        errors = {}
        table = self.records.table(gone, [BASELINE, name])
        for metric, kind in METRICS.items():
            base = float(everything[kind].sum() / tokens)
            difference, errors[metric] = paired(table, name, BASELINE, metric)
            result[metric] = finite(base + difference)
            errors[metric] = finite(errors[metric])
        result["samples"] = len(table[name]["tokens"])
        result["tokens"] = int(table[name]["tokens"].sum())
        return result if name == BASELINE else result | {"standard_error": errors}

    def layer_figures(self, gone: Sequence[Knockout], name: str) -> dict[str, Any]:
        """Block influence (1 - mean cosine of a layer's input and output, ShortGPT, 2403.03853) and share of a pass's time."""
        key = tuple(k.name for k in gone)
        found = [pair for (removed, _), pair in self.records.layers.items() if removed == key]
        influence = [part[name] for part, _ in found if name in part]
        tokens = sum(count for _, count in influence)
        seconds = sum(part.get(name, 0.0) for _, part in found)
        return {
            "block_influence": finite(sum(total or math.nan for total, _ in influence) / tokens)
            if tokens
            else None,
            "latency_saved": finite(seconds / sum(part["all"] for _, part in found)),
        }


def _worst_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


class HealedScan(Scan):
    """A scan in which the model is healed after every cut, and each candidate's seam; in one process."""

    def __init__(
        self, job: Job, records: Path | None, calib: str, calib_tokens: int, quiet: bool | None = None
    ):
        super().__init__(job, records, quiet=quiet)
        if self.cluster or self.world > 1:
            raise PruneKitError(
                "--heal works in one process: unset RAY_ADDRESS, and start it without torchrun"
            )
        scanner = load_scanner(job)
        data = calibrate(
            scanner.model, scanner.checkpoint, calib, calib_tokens, job.max_length,
            model_type=job.model_type, template=job.template,
        )  # fmt: skip
        self.scanner = HealedScanner(scanner, data)

    def generate(self, gone, rows):
        self.scanner.heal(gone)
        return super().generate(gone, rows)

    def measure(self, gone, candidates, batches, what):
        """All batches in one go: a candidate's refit serves them all."""
        key = tuple(k.name for k in gone)
        known = [self.records.scores.get((key, index), {}) for index in range(self.batches)]
        missing = [k for k in candidates if any(k.name not in scores for scores in known)]
        if not missing and all(BASELINE in scores for scores in known):
            return
        with tqdm(total=len(missing), desc=what, unit="layer", disable=self.quiet, leave=False) as bar:
            for index, found in enumerate(self.scanner.measure(gone, missing, bar.update)):
                self.records.add({"gone": list(key), "batch": index, **found})


def generate_without(item: tuple[Job, tuple[Knockout, ...], int]) -> dict[str, Any]:
    """Exact match and character error rate of greedy answers to the data set's first rows, without some layers."""
    job, gone, rows = item
    scanner = load_scanner(job)
    with scanner.without(gone):
        return measure_generation(job, scanner, rows)


def measure_generation(job: Job, scanner: Scanner, rows: int) -> dict[str, Any]:
    from swift import TransformersEngine

    engine = TransformersEngine(scanner.model, template=template_of(job, scanner.checkpoint))
    samples = read_rows(job.dataset, rows)
    answers = generate(engine, samples)
    return {key: finite(value) for key, value in score_answers(answers, samples, {}).items()} | {
        "samples": len(samples)
    }


def find_path(
    scan: Scan,
    candidates: Sequence[Knockout],
    count: int | None,
    target: float | None,
    race_share: float | None,
    generation: int = 0,
) -> list[dict[str, Any]]:
    """Remove what costs least loss per parameter saved, scan again, and so on: the greedy path.

    Ends after `count` removals, at `target` of the parameters, or where nothing more can go. With `race_share` each
    choice is a race for the best one. Entries: `removed` (names), `parameters`, metrics of the model so cut.
    """
    gone: list[Knockout] = []
    path = []
    while True:
        scan.measure(gone, [], range(scan.batches), f"without {len(gone)} layers")
        left = scan.parameters_without(gone)
        entry = {"removed": [k.name for k in gone], "parameters": left, **scan.score(gone, BASELINE)}
        path.append(entry | {"generation": scan.generate(gone, generation) if generation else None})
        done = len(gone) == count or (target is not None and left <= target * scan.parameters)
        after = {k: scan.parameters_without([*gone, k]) for k in candidates if k not in gone}
        possible = [k for k, parameters in after.items() if parameters is not None]
        if done or not possible:
            return path
        weight = {k.name: 1 / (left - after[k]) for k in possible}
        what = f"choose layer {len(gone) + 1}"
        if race_share:
            [best], _ = scan.race(gone, possible, 1, weight, race_share, what)
        else:
            scan.measure(gone, possible, range(scan.batches), what)
            base = scan.score(gone, BASELINE)[CRITERION]
            costs = {k.name: scan.score(gone, k.name)[CRITERION] for k in possible}
            costs = {name: (cost - base) * weight[name] for name, cost in costs.items() if cost is not None}
            if not costs:
                return path
            best = min(costs, key=costs.get)
        gone = [*gone, next(k for k in possible if k.name == best)]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument(
        "--dataset", required=True, help='JSONL to score on: ms-swift messages or {"text": ...}'
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the scan; an unfinished one is continued"
    )
    parser.add_argument("--text", default="all", help="text layers: all, none, or like 0-3,10 (default: all)")
    parser.add_argument("--vision", default="all", help="vision blocks, likewise")
    parser.add_argument(
        "--tokens", type=int, default=65_536, help="of the data set to score on, 0: all (default: 65536)"
    )
    parser.add_argument(
        "--max-length", type=int, default=4096, help="of a row; longer ones are left out (default: 4096)"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, help="padding included (default: 4096)")
    parser.add_argument(
        "--no-suffix", action="store_true", help="don't count what ends every answer (<|im_end|>)"
    )
    parser.add_argument(
        "--race", action="store_true", help="samples only where it is undecided which are the best"
    )
    parser.add_argument(
        "--race-share", type=float, default=0.3, help="of the full scan's work at most (default: 0.3)"
    )
    parser.add_argument("--best", type=int, default=10, help="how many the race is for (default: 10)")
    parser.add_argument("--greedy", type=int, metavar="K", help="find a set of K layers, one by one")
    parser.add_argument(
        "--target-params", type=float, metavar="SHARE", help="or until so many parameters are left"
    )
    parser.add_argument(
        "--heal", action="store_true", help="score with the seams healed (with --greedy; needs --calib)"
    )
    parser.add_argument("--calib", metavar="JSONL", help="to heal on: other rows than those of --dataset")
    parser.add_argument("--calib-tokens", type=int, default=16_384, metavar="N", help="(default: 16384)")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="also answer N rows without each of the best"
    )
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in")
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--gpus-per-task", type=int, default=0, help="on a Ray cluster (default: 0)")
    args = parser.parse_args()
    if args.heal != bool(args.calib) or (args.heal and not (args.greedy or args.target_params)):
        parser.error("--heal needs --calib, and --greedy or --target-params")
    if not 0 < args.race_share <= 1 or not 0 < (args.target_params or 0.5) < 1:
        parser.error("--race-share and --target-params are shares between 0 and 1")
    run_scan(args)


def run_scan(args: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(args.model)
    check_causal(checkpoint)
    candidates = plan_knockouts(checkpoint, args.text, args.vision)[1:]
    rows = read_calibration(args.dataset)
    if args.calib:
        read_calibration(args.calib)
    if args.generate and "text" in rows[0]:
        raise PruneKitError(
            f"--generate: {args.dataset} has texts, no questions with answers; give messages, or leave it out"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if world > 1:
        if torch.cuda.is_available():
            device = device or f"cuda:{os.environ['LOCAL_RANK']}"
        distributed.init_process_group("gloo")
    job = Job(
        args.model, args.dataset, args.tokens or None, args.max_length, args.batch_tokens, args.race, not args.no_suffix,
        device, args.dtype, args.model_type, args.template,
    )  # fmt: skip
    ignored = ("out", "gpus_per_task", "device")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    settings["fingerprint"] = fingerprint(checkpoint)
    if rank == 0:
        lock = claim_folder(args.out, settings, "scan")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    with cluster.connected() if os.environ.get("RAY_ADDRESS") else contextlib.nullcontext():
        result = search(args, job, candidates)
    if rank == 0:
        write_json(args.out / "scan.json", result | {"settings": settings})
        print_scan(result)
        lock.close()
    if world > 1:
        distributed.destroy_process_group()


def search(args: argparse.Namespace, job: Job, candidates: list[Knockout]) -> dict[str, Any]:
    """Do what the command line asks for: the content of scan.json."""
    scan = Scan(job, args.out / "records.jsonl", args.gpus_per_task)
    best, undecided = None, set()
    if args.race:
        best, undecided = scan.race(
            [], candidates, args.best, {k.name: 1.0 for k in candidates}, args.race_share
        )
    else:
        scan.measure([], candidates, range(scan.batches), "scan")
    result = describe(scan, candidates, best, undecided)
    if args.generate:
        for entry in result["removals"]:
            if entry["name"] in result["best"][: args.best]:
                [knockout] = [k for k in candidates if k.name == entry["name"]]
                entry["generation"] = scan.generate([knockout], args.generate)
    if args.greedy or args.target_params:
        searched = scan
        if args.heal:
            searched = HealedScan(job, args.out / "records-healed.jsonl", args.calib, args.calib_tokens)
        share = args.race_share if args.race and not args.heal else None
        path = find_path(searched, candidates, args.greedy, args.target_params, share, args.generate)
        result["greedy"] = {
            "healed": args.heal,
            "criterion": f"{CRITERION} per parameter saved",
            "path": path,
        }
    return result


def describe(
    scan: Scan, candidates: Sequence[Knockout], best: list[str] | None, undecided: set[str]
) -> dict[str, Any]:
    """The content of scan.json."""
    removals = []
    for knockout in candidates:
        scores = scan.score([], knockout.name)
        parameters = scan.parameters_without([knockout])
        removals.append(
            {
                "name": knockout.name,
                "stack": knockout.stack,
                "layer": knockout.layer,
                "parameters": parameters,
                "parameters_saved": scan.parameters - parameters,
                **scan.layer_figures([], knockout.name),
                **scores,
                "decided": knockout.name not in undecided,
                "generation": None,
                "error": None if scores["loss"] is not None else "loss is NaN",
            }
        )
    result = {
        "predictor": PREDICTOR if best is None else CRITERION,
        "counts_suffix": scan.job.counts_suffix,
        "baseline": {**scan.score([], BASELINE), "parameters": scan.parameters},
        "removals": removals,
        "greedy": None,
    }
    return result | {"best": best or finalists(result, None)}


def print_scan(result: dict[str, Any]) -> None:
    base = result["baseline"]
    counted = "" if result["counts_suffix"] else ", suffix tokens left out"
    print(
        f"baseline: token_acc {base['token_acc']:.4f}, loss {base['loss']:.4f} ({base['samples']} samples, {base['tokens']} tokens{counted})"
    )
    by_name = {entry["name"]: entry for entry in result["removals"]}
    for name in result["best"]:
        entry = by_name[name]
        print(
            f"{name:>10}  token_acc {entry['token_acc']:.4f}  loss {entry['loss']:.4f} ± {entry['standard_error']['loss'] or 0:.4f}"
            f"  KL {entry['kl']:.4f}  {entry['parameters_saved'] / base['parameters']:.1%} of the parameters"
            + ("" if entry["decided"] else "  (undecided)")
        )
    for entry in (result["greedy"] or {}).get("path", [])[1:]:
        print(
            f"without {' '.join(entry['removed'])}: token_acc {entry['token_acc']:.4f}  loss {entry['loss']:.4f}"
            f"  {entry['parameters'] / base['parameters']:.1%} of the parameters left"
        )


if __name__ == "__main__":
    run_script(main)
